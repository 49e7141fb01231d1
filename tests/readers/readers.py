"""What real readers make of exported codes: numpy, pyarrow, datasets, webdataset, safetensors, and by their documented rule the readers of
LlamaGen, 1d-tokenizer (RAR), 1xgpt, Megatron and datatrove, which have no package without PyTorch; with it: readers_torch.py.

    VQRAE_CLI=target/release/vqrae-cli python -m pytest tests/readers/readers.py     (check.sh makes the environment)

The set is written here, by the description in vqrae/src/codes/set.rs, so that what is expected never went through the program.
"""

import json
import linecache
import os
import subprocess
from pathlib import Path

import blake3
import numpy as np
import pytest

CLI = str(Path(os.environ["VQRAE_CLI"]).absolute())
MODEL = "0f3a"
VIEWS = ["32x32", "32x32/flip"]


class CodeSet:
    """A set of code shards, as jsonl; the second image of every shard is broken."""

    def __init__(self, folder, *, codebook=16384, c=1, grid=(4, 4), views=(None,), shards=2, images=5, seed=0):
        self.folder, self.codebook, self.c, self.grid = Path(folder), codebook, c, grid
        random = np.random.default_rng(seed)
        self.folder.mkdir()
        self.rows = []  # those with codes, in order
        header = {"model_id": MODEL, "preprocessing": "32x32-squash-bicubic", "dtype": "f32",
                  "codebook_size": codebook, "codes_per_token": c} | ({"grid": grid} if grid else {})
        for shard in range(shards):
            views_of = [self.image(random, shard * images + image, image == 1, views) for image in range(images)]
            rows = [{"key": f"{shard:05}{i:04}"} | row for i, row in enumerate(row for rows in views_of for row in rows)]
            self.rows += [row for row in rows if "codes" in row]
            self.write_shard(f"{shard:05}", shards, rows)
        manifest = header | {
            "format": "vqrae-shards-1", "tool": "readers.py", "version": "1", "device_kind": "cpu", "batch_shape": None,
            "image_size": [32, 32], "codebook_dim": 8, "order": "raster", "index_base": 0, "layout": "jsonl",
            "code_dtype": "uint16" if codebook <= 65536 else "uint32", "samples_per_shard": images, "seed": None, "augmentations": [],
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest))

    def image(self, random, number, broken, views):
        label = number // 4
        path = f"class {label}/{number:03}.jpg"
        return [{"path": path, "error": "is no image"}] if broken else [self.row(random, number, path, view, label) for view in views]

    def row(self, random, number, path, view, label):
        h, w = self.grid or random.integers(1, 6, 2).tolist()
        codes = random.integers(0, self.codebook, h * w * self.c).tolist()
        row = {"path": path, "codes": codes, "h": h, "w": w, "width": 60, "height": 45,
               "class": f"class {label}", "label": label, "caption": f"photo «{number}»,\nof waves"}
        return row | ({"view": view} if view else {})

    def write_shard(self, name, shards, rows):
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        codes = [row["codes"] for row in rows if "codes" in row]
        counts = np.bincount(np.concatenate(codes), minlength=self.codebook)
        share = counts[counts > 0] / counts.sum()
        stats = {
            "shard": name, "layout": "jsonl", "shards": shards, "inputs": "", "rows": len(rows), "ok": len(codes),
            "errors": len(rows) - len(codes), "codes": int(counts.sum()), "codes_in_use": len(share) / self.codebook,
            "perplexity": float(np.exp(-(share * np.log(share)).sum())), "bytes": file.stat().st_size,
            "blake3": blake3.blake3(file.read_bytes()).hexdigest(),
        }
        (self.folder / f"{name}_stats.json").write_text(json.dumps(stats))

    def export(self, to, *words):
        """Runs the program and returns the folder and the summary."""
        out = self.folder.parent / f"{self.folder.name}-{to}"
        done = subprocess.run([CLI, "export", self.folder, "-o", out, "--to", to, *map(str, words)], check=True, stdout=subprocess.PIPE)
        return out, json.loads(done.stdout)

    def arrays(self):
        """The codes of every row, `[h, w]` or `[h, w, c]`."""
        shape = lambda row: (row["h"], row["w"]) + ((self.c,) if self.c > 1 else ())
        return [np.array(row["codes"]).reshape(shape(row)) for row in self.rows]

    def documents(self, offset, begin, row_end, end):
        """What a reader of token streams should find: a grid's rows, each with its end, between begin and end."""
        lines = [np.pad(a.reshape(a.shape[0], -1) + offset, ((0, 0), (0, 1)), constant_values=row_end) for a in self.arrays()]
        return [np.concatenate([[begin], line.ravel(), [end]]) for line in lines]


@pytest.fixture
def codes(tmp_path):
    return lambda **settings: CodeSet(tmp_path / f"set{len(list(tmp_path.iterdir()))}", **settings)


KINDS = [{}, {"codebook": 100_000}, {"c": 2, "codebook": 64}, {"grid": None}, {"grid": None, "c": 3, "codebook": 70_000}]


@pytest.mark.parametrize("kind", KINDS)
def test_pyarrow_reads_the_canonical_form(codes, kind):
    import pyarrow.parquet as pq

    made = codes(**kind)
    out, summary = made.export("parquet")
    files = sorted(out.glob("*.parquet"))
    tables = [pq.read_table(file) for file in files]
    rows = [row for table in tables for row in table.to_pylist()]
    assert summary["documents"] == len(rows) == len(made.rows) and summary["left_out"] == 2
    for got, expected in zip(rows, made.rows):
        assert {key: got[key] for key in expected} == expected
        assert got["status"] == "ok" and got["error"] is None and got["c"] == made.c
    kind_of_list = tables[0].schema.field("codes").type
    assert str(kind_of_list.value_type) == ("uint16" if made.codebook <= 65536 else "uint32")
    if made.grid:
        assert kind_of_list.list_size == made.grid[0] * made.grid[1] * made.c
    assert json.loads(pq.read_metadata(files[0]).metadata[b"vqrae"])["model_id"] == MODEL
    # As an array, without a Python object a code.
    column = tables[0].column("codes").combine_chunks()
    flat = column.flatten().to_numpy()
    assert flat.tolist() == [code for row in made.rows[: len(tables[0])] for code in row["codes"]]


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_reads_parquet_and_lines(codes, tmp_path, kind):
    import datasets

    made = codes(**kind)
    for to, builder, files in [("parquet", "parquet", "*.parquet"), ("jsonl", "json", "0*.jsonl")]:
        out, _ = made.export(to)
        found = datasets.load_dataset(builder, data_files=str(out / files), split="train", cache_dir=str(tmp_path / "cache"))
        assert [row["codes"] for row in found] == [row["codes"] for row in made.rows]
        assert [(row["label"], row["caption"], row["path"]) for row in found] == [
            (row["label"], row["caption"], row["path"]) for row in made.rows
        ]
        streamed = datasets.load_dataset(builder, data_files=str(out / files), split="train", streaming=True)
        assert [row["key"] for row in streamed] == [row["key"] for row in made.rows]
    if made.grid:
        batch = found.with_format("numpy")[:]["codes"]
        assert np.array_equal(np.stack(batch), np.stack([a.ravel() for a in made.arrays()]))


@pytest.mark.parametrize("kind", KINDS)
def test_webdataset_reads_tars(codes, kind):
    import webdataset

    made = codes(**kind)
    out, _ = made.export("webdataset")
    shards = webdataset.WebDataset(str(out / "{00000..00001}.tar"), shardshuffle=False)
    samples = list(shards.decode().to_tuple("__key__", "codes.npy", "json", "cls", "txt"))
    assert len(samples) == len(made.rows)
    for (key, array, record, label, caption), row, expected in zip(samples, made.rows, made.arrays()):
        assert (key, label, caption) == (row["key"], row["label"], row["caption"])
        assert array.dtype == ("uint16" if made.codebook <= 65536 else "int32") and np.array_equal(array, expected)
        assert record["row"]["path"] == row["path"] and record["codes"]["model_id"] == MODEL


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_safetensors_read_a_file_an_image(codes, kind):
    import safetensors
    import safetensors.numpy

    made = codes(**kind)
    arrays, tensors = made.export("npy")[0], made.export("safetensors")[0]
    for row, expected in zip(made.rows, made.arrays()):
        array = np.load(arrays / "codes" / f"{row['path']}.npy")
        file = tensors / "codes" / f"{row['path']}.safetensors"
        tensor = safetensors.numpy.load_file(file)["codes"]
        assert array.dtype == tensor.dtype == np.int32
        assert np.array_equal(array, expected) and np.array_equal(tensor, expected)
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata()["source"] == row["path"]


def test_what_tokenize_writes_is_read_without_an_export(tmp_path):
    """The canonical form of real photos, beside the files of single images that the same model makes."""
    import datasets
    import pyarrow.parquet as pq

    photos = Path(__file__).parents[2] / "examples" / "photos"
    run = lambda *words: subprocess.run([CLI, *map(str, words)], check=True, stdout=subprocess.PIPE)
    run("tokenize", photos, "-o", tmp_path / "set")
    run("export", tmp_path / "set", "-o", tmp_path / "npy", "--to", "npy")
    run("tokenize", photos, "-o", tmp_path / "files", "--output-format", "npy")
    rows = pq.read_table(tmp_path / "set" / "00000.parquet").to_pylist()
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "set" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    paths = sorted((str(path.relative_to(photos)) for path in photos.rglob("*") if path.suffix in (".jpg", ".png")), key=os.fsencode)
    assert [row["path"] for row in rows] == list(found["path"]) == paths
    for row, codes in zip(rows, found["codes"]):
        expected = np.load(tmp_path / "files" / "codes" / f"{row['path']}.npy")
        assert row["codes"] == list(codes) == expected.ravel().tolist() and (row["h"], row["w"]) == expected.shape
        assert np.array_equal(np.load(tmp_path / "npy" / "codes" / f"{row['path']}.npy"), expected)


def test_llamagen_classes_to_images(codes):
    """dataset/imagenet.py: (1, n_aug, T), one of which is picked, then (B, T) after reshape; labels (1,)."""
    made = codes(views=VIEWS)
    out, summary = made.export("llamagen-c2i", "--name", "imagenet256")
    images = [made.rows[i : i + 2] for i in range(0, len(made.rows), 2)]
    assert summary["documents"] == len(images)
    for i, views in enumerate(images):
        features = np.load(out / "imagenet256_codes" / f"{i}.npy")
        label = np.load(out / "imagenet256_labels" / f"{i}.npy")
        assert features.shape == (1, 2, 16) and features.dtype == label.dtype == np.int64
        for aug, row in enumerate(views):
            assert features[:, aug].reshape(-1).tolist() == row["codes"]
        assert label.tolist() == [views[0]["label"]]
    assert not (out / "imagenet256_codes" / f"{len(images)}.npy").exists()


def test_llamagen_captions_to_images(codes):
    """extract_codes_t2i.py, extract_t5_feature.py: lists in the order of their names, a line an image, codes by list and line."""
    made = codes()
    out, _ = made.export("llamagen-t2i")
    found = []
    for name in sorted(os.listdir(out)):
        if name.endswith(".jsonl"):
            for number, line in enumerate(open(out / name)):
                line = json.loads(line)
                array = np.load(out / name.split(".")[0] / f"{number}.npy")
                assert array.dtype == np.int64
                found.append((line["image_path"], line["text"][0], array.tolist()))
    assert found == [(row["path"], row["caption"], [row["codes"]]) for row in made.rows]


def test_titok_lines(codes):
    """PretoeknizedDataSetJSONL: lines are counted, then picked through linecache."""
    made = codes(c=2, codebook=512)
    out, _ = made.export("rar", "--name", "train")
    file = str(out / "train.jsonl")
    count = sum(1 for _ in open(file))
    lines = [json.loads(linecache.getline(file, i + 1).strip()) for i in range(count)]
    assert [(line["class_id"], line["tokens"]) for line in lines] == [(row["label"], row["codes"]) for row in made.rows]


@pytest.mark.parametrize("codebook", [16384, 1 << 18])
def test_1xgpt_array(codes, codebook):
    """RawTokenDataset: a memory map of the shape that metadata.json tells; clips must not go back."""
    made = codes(codebook=codebook)
    out, _ = made.export("1xgpt", "--hz", 30)
    told = json.load(open(out / "metadata.json"))
    shape = (told["num_images"], told["s"], told["s"])
    data = np.memmap(out / "video.bin", dtype=np.dtype(told.get("token_dtype", "uint32")), mode="r", shape=shape)
    assert np.array_equal(data, np.stack(made.arrays())) and told["vocab_size"] == codebook and told["hz"] == 30
    assert (out / "video.bin").stat().st_size == data.nbytes
    segments = np.memmap(out / "segment_ids.bin", dtype=np.int32, mode="r", shape=shape[:1])
    assert (np.diff(segments) >= 0).all()
    folders = [os.path.dirname(row["path"]) for row in made.rows]
    assert (np.diff(segments) > 0).tolist() == [a != b for a, b in zip(folders, folders[1:])]


AROUND = {"offset": 32_000, "begin": 1, "end": 2}


def around(made):
    tokens = AROUND | {"row_end": AROUND["offset"] + made.codebook}
    words = [part for name, id in tokens.items() for part in ("--id-offset" if name == "offset" else f"--{name.replace('_', '-')}", id)]
    return words, made.documents(**tokens)


def megatron(out):
    """The documents of a folder, as megatron/core/datasets/indexed_dataset.py finds them, in numpy."""
    idx = (out / "codes.idx").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00" and np.frombuffer(idx, np.uint64, 1, 9) == 1
    dtype = {8: np.uint16, 4: np.int32}[idx[17]]
    sequences, documents = np.frombuffer(idx, np.uint64, 2, 18).astype(int)
    lengths = np.frombuffer(idx, np.int32, sequences, 34)
    pointers = np.frombuffer(idx, np.int64, sequences, 34 + lengths.nbytes)
    starts = np.frombuffer(idx, np.int64, documents, 34 + lengths.nbytes + pointers.nbytes)
    assert len(idx) == 34 + lengths.nbytes + pointers.nbytes + starts.nbytes and starts.tolist() == list(range(sequences + 1))
    data = np.memmap(out / "codes.bin", mode="r")
    return [np.frombuffer(data, dtype, length, pointer).tolist() for length, pointer in zip(lengths, pointers)]


def datatrove(out):
    """The documents of a folder, as datatrove/utils/dataset.py and pipeline/tokens/tokenizer.py find them, in numpy."""
    tokenizer, count, _ = (out / "codes.ds.metadata").read_text().split("\n")
    name, width = tokenizer.split("|")
    tokens = np.fromfile(out / "codes.ds", {"2": np.uint16, "4": np.uint32}[width])
    ends = np.fromfile(out / "codes.ds.index", np.uint64).astype(int)
    assert name == f"vqrae-{MODEL}" and int(count) == len(tokens) == ends[-1]
    return [document.tolist() for document in np.split(tokens, ends[:-1])]


@pytest.mark.parametrize("read, to", [(megatron, "megatron"), (datatrove, "datatrove")])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_ids(codes, kind, read, to):
    made = codes(**kind)
    words, expected = around(made)
    out, _ = made.export(to, *words)
    assert read(out) == [tokens.tolist() for tokens in expected]
