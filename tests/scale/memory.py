"""Peak memory of `tokenize` over many images: a listing of its own, and a rank that reads a plan.

    cargo build --release -p vqrae-cli
    python tests/scale/memory.py [10000 200000 …]

The images are links to twenty small ones and the model is a tiny one, so that counts can be large; what is measured is what
grows with the number of images. Linux: the resident set is that of wait4.
"""

import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import zlib

ROOT = pathlib.Path(__file__).parents[2]
CLI = os.environ.get("VQRAE_CLI", ROOT / "target/release/vqrae-cli")
MODEL = ROOT / "tests/fixtures/vqrae"


def png(seed: int, side: int = 24) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = lambda y: b"\0" + bytes((x * 7 + y * 3 + seed * 11 + c * 50) % 256 for x in range(side) for c in range(3))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(row(y) for y in range(side)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def peak_mib(folder: str, *words: str) -> float:
    child = subprocess.Popen([CLI, "tokenize", "photos", "--model", MODEL, "--batch-size", "64", *words],
                             cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, status
    return usage.ru_maxrss / 1024


print("| images | tokenize | one of ten ranks, with a plan |")
print("|---|---|---|")
for count in map(int, sys.argv[1:] or ["10000", "200000"]):
    with tempfile.TemporaryDirectory() as folder:
        for i in range(20):
            pathlib.Path(folder, f"{i}.png").write_bytes(png(i))
        for i in range(count):
            place = pathlib.Path(folder, "photos", f"class{i % 200:03}")
            if i < 200:
                place.mkdir(parents=True)
            # A file system allows some 65,000 links to a file.
            os.link(f"{folder}/{i % 20}.png", place / f"image_with_a_name_{i:07}.png")
        alone = peak_mib(folder, "-o", "out")
        peak_mib(folder, "-o", "planned", "--plan")
        rank = peak_mib(folder, "-o", "planned", "--shard-index", "0", "--num-shards", "10")
        print(f"| {count:,} | {alone:.0f} MiB | {rank:.0f} MiB |")
