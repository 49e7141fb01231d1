"""The page's commands, as they stand there: ours are run, the last of each project's by a `torchrun` or `accelerate` that notes its words, and what
they would read is read by the rule of their readers. No weights, no PyTorch; with it, `train.py` learns.

The program is named by VQRAE_CLI; `numpy`, `pillow`, `pyarrow`, `tokenizers` and `vqrae` are installed.
"""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
PHOTOS = HERE.parents[1] / "examples/photos"
PROGRAM = Path(os.environ.get("VQRAE_CLI", "target/release/vqrae-cli")).absolute()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (HERE / "README.md").read_text(), re.M | re.S))

# Notes where it was called and its words, one a line.
NOTES = '#!/bin/sh\n{ pwd; echo "PYTHONPATH=$PYTHONPATH"; printf "%s\\n" "$0" "$@"; } >"$NOTE"\n'


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def place(tmp_path):
    """A folder with all that the page takes for granted."""
    for i, photo in enumerate(sorted(path for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".png"))):
        folder = tmp_path / "photos" / ["cats", "dogs", "others"][i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder)
    lines = [{"path": str(path.relative_to(tmp_path)), "caption": f"a photo of {path.stem}"} for path in sorted(tmp_path.rglob("photos/*/*"))]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["a photo of"], trainers.BpeTrainer(vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    for name, text in [
        ("LlamaGen/dataset/imagenet.py", 'files = [f"{i}.npy" for i in range(1281167)]\n'),
        ("1d-tokenizer/scripts/train_rar.py", 'a\n        hf_hub_download(repo_id="yucornetto/RAR", filename="x")\nb\n'),
        ("Megatron-LM/pretrain_gpt.py", ""),
    ]:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    shutil.copy(HERE / "train.py", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/vqrae-cli").symlink_to(PROGRAM)
    (tmp_path / "bin/python").symlink_to(sys.executable)
    executable(tmp_path / "bin/torchrun", NOTES)
    executable(tmp_path / "bin/accelerate", NOTES)
    return tmp_path


def run(place, script):
    """Runs lines of the page and returns what the last of them was told: the folder, and its words."""
    note = place / "note"
    note.unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "NOTE": str(note), "PYTHONPATH": ""}
    done = subprocess.run(["bash", "-euc", script], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if not note.exists():
        return None
    folder, variable, _, *words = note.read_text().splitlines()
    return Path(folder), variable, words


def commands(section):
    (block,) = re.findall(r"```sh\n(.*?)```", SECTIONS[section], re.S)
    return block


def flags(words):
    """`--flag value` and `key=value` of a command."""
    found = dict(word.lstrip("-").split("=", 1) for word in words if "=" in word)
    return found | {word[2:]: value for word, value in zip(words, words[1:]) if word.startswith("--") and "=" not in word}


def rows_of(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_llamagen(place):
    folder, variable, words = run(place, commands("LlamaGen"))
    told = flags(words)
    assert folder.name == "LlamaGen" and variable == "PYTHONPATH=." and "autoregressive/train/train_c2i.py" in words
    # dataset/imagenet.py: as many files as it now counts on, one of several views, and train_c2i.py's shapes.
    count = int(re.search(r"range\((\d+)\)", (folder / "dataset/imagenet.py").read_text())[1])
    features, labels = (folder / told["code-path"] / f"imagenet{told['image-size']}_{kind}" for kind in ("codes", "labels"))
    assert count == len(list(labels.iterdir())) == 6 and "flip" in str(features)
    side = int(told["image-size"]) // int(told["downsample-size"])
    views = {}
    for row in rows_of(place / "flipped"):
        views.setdefault(row["path"], []).append(row)
    for i, rows in zip(range(count), views.values(), strict=True):
        array, label = np.load(features / f"{i}.npy"), np.load(labels / f"{i}.npy")
        assert array.shape == (1, 2, side * side) and array.dtype == label.dtype == np.int64
        assert array[0].tolist() == [row["codes"] for row in rows] and array.max() < int(told["vocab-size"])
        assert label.tolist() == [rows[0]["label"]] and label < int(told["num-classes"])


def test_rar(place):
    folder, _, words = run(place, commands("RAR"))
    told = flags(words)
    assert (folder / "scripts/train_rar.py").read_text() == "a\nb\n" and words[0] == "launch"
    lines = [json.loads(line) for line in open(folder / told["dataset.params.pretokenization"])]
    rows = rows_of(place / "codes")
    assert [(line["class_id"], line["tokens"]) for line in lines] == [(row["label"], row["codes"]) for row in rows]
    for line in lines:
        assert len(line["tokens"]) == int(told["model.generator.image_seq_len"])
        assert max(line["tokens"]) < int(told["model.vq_model.codebook_size"])
        assert line["class_id"] < int(told["model.generator.condition_num_classes"])


def test_a_language_model(place):
    folder, _, words = run(place, commands("A language model in Megatron-LM"))
    told = flags(words)
    assert folder.name == "Megatron-LM" and "pretrain_gpt.py" in words
    # HuggingFaceTokenizer loads the folder; IndexedDataset finds the documents.
    assert json.loads((folder / told["tokenizer-model"] / "tokenizer_config.json").read_text())["tokenizer_class"]
    tokenizer = Tokenizer.from_file(str(folder / told["tokenizer-model"] / "tokenizer.json"))
    prefix = folder / told["data-path"]
    idx = Path(f"{prefix}.idx").read_bytes()
    dtype, (count,) = {8: np.uint16, 4: np.int32}[idx[17]], np.frombuffer(idx, np.uint64, 1, 18)
    lengths = np.frombuffer(idx, np.int32, int(count), 34)
    documents = np.split(np.fromfile(f"{prefix}.bin", dtype), np.cumsum(lengths)[:-1])
    rows = rows_of(place / "captioned")
    assert len(documents) == len(rows) == 6 and lengths.max() < int(told["seq-length"])
    for ids, row in zip(documents, rows):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        codes = np.array(row["codes"]).reshape(row["h"], row["w"])
        image = "".join("".join(f"<|visual token {code:06}|>" for code in line) + "<|image row end|>" for line in codes)
        assert text == f"{row['caption']}<|image start|>16*16<|image token|>{image}<|image end|></s>"
        assert tokenizer.encode(text).ids == ids.tolist()

    # The words beside the block.
    for words in re.findall(r"`(--(?:order|text|prompt|as)[^`]*)`", SECTIONS["A language model in Megatron-LM"]):
        run(place, f"vqrae-cli export captioned -o other --to lm --tokenizer with-images --overwrite {words}")


def test_codes_become_images_again(place):
    pytest.importorskip("vqrae._vqrae")  # `vqrae` alone is also a folder of this repository
    import vqrae

    run(place, commands("A language model in Megatron-LM"))
    row = rows_of(place / "captioned")[0]
    codes = np.array(row["codes"], np.int32).reshape(1, row["h"], row["w"])
    (place / "run").mkdir()
    np.save(place / "run/samples.npy", np.concatenate([codes, codes]))
    idx = (place / "megatron/codes.idx").read_bytes()
    first = int(np.frombuffer(idx, np.int32, 1, 34)[0])
    np.save(place / "ids.npy", np.fromfile(place / "megatron/codes.bin", {8: np.uint16, 4: np.int32}[idx[17]])[:first])
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS["And back"], re.S)
    told = {}
    folder = os.getcwd()
    try:
        os.chdir(place)
        exec(compile(block, "README.md", "exec"), told)
    finally:
        os.chdir(folder)
    expected = vqrae.Tokenizer().decode(codes)
    assert np.array_equal(told["images"], np.concatenate([expected, expected])) and np.array_equal(told["image"], expected)


def loop(place, *words):
    """The two lines of the own loop, with other words for `train.py`."""
    ours, theirs = commands("Your own PyTorch loop").splitlines()
    run(place, ours)
    program, script, folder, *_ = shlex.split(theirs)
    assert (program, script) == ("python", "train.py")
    # Threads that wait for each other on a machine that others use too take ten times as long as one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script, folder, *words], cwd=place, env=environment, capture_output=True, text=True)


def test_the_data_of_the_own_loop(place, monkeypatch):
    done = loop(place, "--dry-run", "--batch-size", "4")
    assert done.returncode == 0, done.stderr
    assert "6 images, 3 classes, ids below 16387; a batch: int64 (4, 257)" in done.stdout
    monkeypatch.syspath_prepend(str(HERE))
    import train

    codes, rows = train.Codes(place / "codes"), rows_of(place / "codes")
    assert codes.codes.tolist() == [row["codes"] for row in rows] and codes.labels.tolist() == [row["label"] for row in rows]
    sequences = {(16384 + row["label"], *row["codes"]) for row in rows}
    batch = codes.batch(3, 64)
    assert {tuple(line) for line in batch.tolist()} == sequences
    assert np.array_equal(batch, codes.batch(3, 64)) and not np.array_equal(batch, codes.batch(4, 64))


def test_codes_without_labels_are_refused_with_a_next_step(place):
    run(place, "vqrae-cli tokenize --files-from captions.jsonl -o codes --labels none")
    done = subprocess.run([sys.executable, "train.py", "codes", "--dry-run"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 1 and "rows without a label" in done.stderr


def test_the_own_loop_learns(place):
    pytest.importorskip("torch")
    words = ["--steps", "40", "--batch-size", "2", "--width", "32", "--depth", "1", "--heads", "2", "--lr", "1e-2", "--log-every", "39"]
    done = loop(place, "-o", "run", *words)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] - 1, done.stdout
    samples = np.load(place / "run/samples.npy")
    assert samples.shape == (3, 16, 16) and samples.dtype == np.int32 and 0 <= samples.min() and samples.max() < 16384
