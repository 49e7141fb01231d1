"""What readers that need PyTorch make of exported codes: Megatron's own IndexedDataset, datatrove's own data sets, and torch's embedding and
loader where the projects have no package. Also: the same tokens written by Megatron's and datatrove's own writers give the same bytes.

    VQRAE_CLI=target/release/vqrae-cli python -m pytest tests/readers/readers_torch.py     (check.sh --all makes the environment)
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from readers import KINDS, around, codes, megatron  # noqa: F401: codes is a fixture
from readers_lm import vocab


@pytest.mark.parametrize("kind", KINDS)
def test_megatrons_own_reader_and_writer(codes, tmp_path, kind):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    made = codes(**kind)
    words, expected = around(made)
    out, _ = made.export("megatron", *words)
    for mmap in (True, False):
        found = IndexedDataset(str(out / "codes"), mmap=mmap)
        assert len(found) == len(expected) and found.document_indices.tolist() == list(range(len(expected) + 1))
        for i, tokens in enumerate(expected):
            assert found[i].tolist() == tokens.tolist()
            assert found.get(i, offset=1, length=2).tolist() == tokens[1:3].tolist()

    vocabulary = max(tokens.max() for tokens in [*expected, np.array([32_000 + made.codebook])]) + 1
    own = str(tmp_path / "own")
    builder = IndexedDatasetBuilder(own + ".bin", dtype=DType.optimal_dtype(int(vocabulary)))
    for tokens in expected:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(own + ".idx")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"own.{suffix}").read_bytes() == (out / f"codes.{suffix}").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_datatroves_own_reader_and_writer(codes, tmp_path, kind):
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile
    from datatrove.utils.dataset import DatatroveFolderDataset

    made = codes(**kind)
    words, expected = around(made)
    out, _ = made.export("datatrove", *words)
    tokenizer, width = (out / "codes.ds.metadata").read_text().split("\n")[0].split("|")
    stream = np.concatenate(expected)
    length = 6
    found = DatatroveFolderDataset(str(out), length, token_size=int(width), return_positions=True)
    windows = [found[i] for i in range(len(found))]
    assert len(windows) == len(stream) // (length + 1) > 0
    assert torch.cat([window["input_ids"] for window in windows]).tolist() == stream[: len(windows) * (length + 1)].tolist()
    # Where in its image a token is; a window starts anew.
    place = np.concatenate([np.arange(len(tokens)) for tokens in expected])
    for i, window in enumerate(windows):
        begin = i * (length + 1)
        expected_places = [min(place[begin + j], j) for j in range(length + 1)]
        assert window["positions"].tolist() == expected_places

    own = TokenizedFile(str(tmp_path / "own"), "codes.ds", tokenizer_name_or_path=tokenizer, save_final_metadata=True, token_size=int(width))
    for tokens in expected:
        own.write(tokens.tolist(), None)
    own.close()
    for name in ("codes.ds", "codes.ds.index", "codes.ds.metadata"):
        assert (tmp_path / "own" / name).read_bytes() == (out / name).read_bytes(), name


def test_text_and_codes_by_their_own_readers(codes, tmp_path):
    from datatrove.utils.dataset import DatatroveFolderDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    made = codes()
    tokenizer, _ = vocab(Path(os.environ["VQRAE_TOKENIZER"]), tmp_path / "tokenizer", "--codes", made.folder)
    out, _ = made.export("lm", "--tokenizer", tokenizer, "--eos", "<EOT>")
    expected, found = megatron(out), IndexedDataset(str(out / "codes"))
    assert [found[i].tolist() for i in range(len(found))] == expected
    assert max(map(max, expected)) >= 65_000  # codes are beyond the text's ids
    other, _ = made.export("lm", "--tokenizer", tokenizer, "--eos", "<EOT>", "--as", "datatrove", "--overwrite")
    stream, length = sum(expected, []), 6
    windows = DatatroveFolderDataset(str(other), length, token_size=4)
    read = torch.cat([windows[i]["input_ids"] for i in range(len(windows))]).tolist()
    assert read == stream[: len(read)] and len(read) > len(stream) - length - 1


def test_a_torch_embedding_takes_the_codes_of_llamagen_as_they_are(codes):
    made = codes(views=["32x32", "32x32/flip"])
    out, summary = made.export("llamagen-c2i", "--name", "imagenet256")
    load = lambda kind, i: torch.from_numpy(np.load(out / f"imagenet256_{kind}" / f"{i}.npy"))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return summary["documents"]

        def __getitem__(self, i):
            return load("codes", i)[:, 1], load("labels", i)

    codes_of_batch, labels = next(iter(torch.utils.data.DataLoader(Images(), batch_size=4)))
    z, c = codes_of_batch.reshape(4, -1), labels.reshape(-1)
    assert torch.nn.Embedding(made.codebook, 4)(z).shape == (4, 16, 4) and torch.nn.Embedding(3, 4)(c).shape == (4, 4)
    assert z.tolist() == [row["codes"] for row in made.rows[1:8:2]]


def test_a_torch_loader_batches_the_canonical_form(codes, tmp_path):
    import datasets

    made = codes()
    out, _ = made.export("parquet")
    found = datasets.load_dataset("parquet", data_files=str(out / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    loader = torch.utils.data.DataLoader(found.select_columns(["codes", "label"]).with_format("torch"), batch_size=8)
    batch = next(iter(loader))
    assert batch["codes"].long().tolist() == [row["codes"] for row in made.rows[:8]]
    assert torch.nn.Embedding(made.codebook, 4)(batch["codes"].long()).shape == (8, 16, 4)
