"""The program that the package is compared with, and what it made of the photos."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import vqrae

ROOT = Path(__file__).resolve().parents[3]
PHOTOS = ROOT / "examples/photos"
FIXTURES = ROOT / "tests/fixtures"


@pytest.fixture(scope="session")
def cli():
    """Runs vqrae-cli, whose path is in VQRAE_CLI."""
    program = os.environ.get("VQRAE_CLI")
    if not program:
        pytest.fail("set VQRAE_CLI to the program: cargo build --release --workspace, then VQRAE_CLI=target/release/vqrae-cli")

    def run(*words):
        done = subprocess.run([Path(program).absolute(), *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 3), done.stderr  # 3: some files could not be read
        return done.stdout

    return run


@pytest.fixture(scope="session")
def codes_of_cli(cli, tmp_path_factory):
    """The codes that the program makes of a folder, by the images' paths in it."""

    def tokenize(folder, *words):
        out = tmp_path_factory.mktemp("out")
        cli("tokenize", folder, "-o", out, "--output-format", "npy", *words)
        return {str(path.relative_to(out / "codes"))[: -len(".npy")]: np.load(path) for path in (out / "codes").rglob("*.npy")}

    return tokenize


@pytest.fixture(scope="session")
def tokenizer():
    return vqrae.Tokenizer()


@pytest.fixture(scope="session")
def make_model(cli, tmp_path_factory):
    """A model folder of an encoder among the fixtures, with a quantizer as wished."""

    def make(encoder, quantizer):
        folder = tmp_path_factory.mktemp("model")
        config = folder / "config.toml"
        config.write_text(f"[quantizer]\n{quantizer}\n[decoder]\nnum_hidden_layers = 1\n")
        cli("init", "--encoder", FIXTURES / encoder, "--config", config, "-o", folder / "model")
        return folder / "model"

    return make
