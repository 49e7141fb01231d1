"""What tokenizers and transformers make of a tokenizer that has learnt codes, and of exported text and codes: on a real one, and on one of
each kind that is trained here.

    VQRAE_CLI=target/release/vqrae-cli VQRAE_TOKENIZER=tokenizer.json python -m pytest tests/readers/readers_lm.py     (check.sh makes all that)
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from readers import CLI, codes, datatrove, megatron  # noqa: F401: codes is a fixture
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "A photo of waves, 16*16.",
    "  two  spaces\n\nand\ttabs ",
    "«Grüße», 写真 и фото 🙂",
    "<|image <|visual token 00001|> <|image start |>",
    "visual token 1|> <|",
    "<EOT><pad></s>",
    "",
]


def vocab(tokenizer, out, *words):
    """Runs the program and returns the folder and the record."""
    subprocess.run([CLI, "vocab", tokenizer, "-o", out, *map(str, words)], check=True, stdout=subprocess.PIPE)
    return out, json.loads((out / "visual_tokens.json").read_text())


def textual(h, w, array, c=1, size=0):
    """An image as Emu3 writes it."""
    of_row = lambda row: "".join(f"<|visual token {code + i % c * size:06}|>" for i, code in enumerate(row)) + "<|image row end|>"
    return f"<|image start|>{h}*{w}<|image token|>" + "".join(map(of_row, array.reshape(h, -1).tolist())) + "<|image end|>"


def trained(kind, folder):
    """A small tokenizer of a kind."""
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=specials)
    tokenizer.train_from_iterator([*TEXTS, "0 1 2 3 4 5 6 7 8 9 photo of waves"], trainer)
    tokenizer.save(str(folder / f"{kind}.json"))
    return folder / f"{kind}.json"


@pytest.fixture(params=["real", "bytes", "unigram", "wordpiece"])
def file(request, tmp_path):
    """A tokenizer.json."""
    return Path(os.environ["VQRAE_TOKENIZER"]) if request.param == "real" else trained(request.param, tmp_path)


def test_text_has_the_ids_it_had(file, tmp_path):
    out, record = vocab(file, tmp_path / "out")
    before, after, loaded = Tokenizer.from_file(str(file)), Tokenizer.from_file(str(out / "tokenizer.json")), AutoTokenizer.from_pretrained(out)
    old, new = before.get_vocab(), after.get_vocab()
    assert old.items() <= new.items() and len(new) == len(old) + record["count"] == len(loaded) == record["vocab_size"]
    assert sorted(new.values()) == list(range(len(new))) and record["first_id"] == len(old)
    names = [f"<|image {name}|>" for name in ("start", "token", "end", "row end")] + [f"<|visual token {code:06}|>" for code in range(16384)]
    assert [new[name] for name in names] == list(range(len(old), len(new))) == loaded.convert_tokens_to_ids(names)
    for text in [*TEXTS, *(a + b for a in TEXTS for b in TEXTS)]:
        encoding = before.encode(text)
        assert encoding.ids == after.encode(text).ids == loaded.encode(text)
        assert before.decode(encoding.ids) == after.decode(encoding.ids)


def test_an_image_as_text_is_one_id_a_code(file, codes, tmp_path):
    made = codes()
    out, record = vocab(file, tmp_path / "out", "--codes", made.folder)
    tokenizer, loaded = Tokenizer.from_file(str(out / "tokenizer.json")), PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
    for (h, w), array in ((array.shape, array) for array in made.arrays()):
        text = textual(h, w, array)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == loaded.encode(text, add_special_tokens=False)
        first = record["codes"]["first_id"]
        assert [id - first for id in ids if id >= first] == array.ravel().tolist()
        assert len([id for id in ids if id >= record["first_id"]]) == array.size + h + 3
        if file.name != "wordpiece.json":  # which puts spaces between tokens
            spaced = lambda text: text.replace(" 4*4", "4*4")  # as Metaspace does before a word
            assert spaced(tokenizer.decode(ids, skip_special_tokens=False)) == spaced(loaded.decode(ids)) == text
            assert tokenizer.decode(ids).strip() == loaded.decode(ids, skip_special_tokens=True).strip() == "4*4"


@pytest.mark.parametrize("kind", [{}, {"grid": None}, {"c": 2, "codebook": 64}])
@pytest.mark.parametrize("words, read", [([], megatron), (["--as", "datatrove"], datatrove)])
def test_documents_decode_to_the_caption_and_the_codes(codes, tmp_path, kind, words, read):
    made = codes(**kind)
    tokenizer, record = vocab(Path(os.environ["VQRAE_TOKENIZER"]), tmp_path / "tokenizer", "--codes", made.folder)
    out, summary = made.export("lm", "--tokenizer", tokenizer, "--eos", "<EOT>", *words)
    documents, loaded = read(out), AutoTokenizer.from_pretrained(tokenizer)
    assert summary["documents"] == len(documents) == len(made.rows)
    for ids, row, array in zip(documents, made.rows, made.arrays()):
        text = row["caption"] + textual(row["h"], row["w"], array, made.c, made.codebook) + "<EOT>"
        assert loaded.decode(ids) == text and loaded.encode(text) == ids
        assert loaded.decode(ids, skip_special_tokens=True) == f"{row['caption']}{row['h']}*{row['w']}"
    # As export.json says to undo it.
    told = json.loads((out / "export.json").read_text())["language"]["visual_tokens"]["codes"]
    found = [[id - told["first_id"] for id in ids if 0 <= id - told["first_id"] < told["count"]] for ids in documents]
    assert [[code % made.codebook for code in codes] for codes in found] == [row["codes"] for row in made.rows]


def test_what_transformers_saves_keeps_its_ids_and_is_extended_with_the_folder(tmp_path):
    file = os.environ["VQRAE_TOKENIZER"]
    saved = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<EOT>", pad_token="<pad>", additional_special_tokens=["<extra>"])
    saved.chat_template = "{{ messages[0].content }}"
    saved.save_pretrained(tmp_path / "saved")
    out, record = vocab(tmp_path / "saved", tmp_path / "out")
    assert record["first_id"] == len(saved) == 65_002
    loaded = AutoTokenizer.from_pretrained(out)
    assert (loaded.eos_token, loaded.pad_token, loaded.chat_template) == (saved.eos_token, saved.pad_token, saved.chat_template)
    assert saved.get_vocab().items() <= loaded.get_vocab().items() and len(loaded) == record["vocab_size"]
    # And once more through transformers, which writes all files anew.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == loaded.get_vocab()
    third, same = vocab(tmp_path / "again", tmp_path / "third")
    assert same == record and (third / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()
