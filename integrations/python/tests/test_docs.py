"""What the documentation says runs, and the types are those of the code."""

import doctest
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import vqrae

PYTHON = r"```python\n(.*?)```"


def test_the_readmes_lines_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(PYTHON, (ROOT / "integrations/python/README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_front_pages_lines_run():
    result = doctest.testmod(vqrae)
    assert result.attempted >= 5 and result.failed == 0


def test_the_types_hold(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        """
import numpy as np
from numpy.typing import NDArray
import vqrae

tokenizer = vqrae.Tokenizer("my-model", device="cpu")
codes: NDArray[np.int32] = tokenizer.encode(["a.jpg", b"..."])
images: NDArray[np.uint8] = tokenizer.decode(codes)
each: list[NDArray[np.int32] | Exception] = tokenizer.encode_each("a.jpg")
grid: tuple[int, int] | None = tokenizer.grid
"""
    )
    (tmp_path / "wrong.py").write_text("import vqrae\nvqrae.Tokenizer(7)\nvqrae.Tokenizer().grid + 1\n")

    def mypy(*words):
        command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
        return subprocess.run([*command, *map(str, words)], cwd=tmp_path, capture_output=True, text=True).stdout

    assert mypy("user.py") == ""
    wrong = mypy("wrong.py")
    assert "wrong.py:2: error" in wrong and "wrong.py:3: error" in wrong, wrong
    assert mypy("-p", "vqrae") == ""


def test_the_stub_is_that_of_the_extension_module():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy.stubtest", "vqrae._vqrae", "--concise"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
