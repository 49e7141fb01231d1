"""Tokenizing on a GPU beside PyTorch: the same weights and pixels, in turns, in one run.

    cargo build --release --features cuda
    python tests/peers/siglip_cuda.py [--shapes siglip-large] [--batches 1,16,64,256] [--rounds 20] [--dtype bf16]
        [--skip eager] [--device cuda]

Needs torch, numpy, safetensors. PyTorch's model is model.py: SDPA for the attention; eager, and by torch.compile(max-autotune). Its
search for the nearest code is an f32 product (tf32 on a GPU) and an argmax, and once more one in bf16, which is faster and gives
wrong codes. Ours is a process of its own, whose search is exact. Pixels lie on the device before the clock starts, and codes are on
the host when it stops. Medians; prints Markdown, with the chip's own rate for a large product in the same numbers.

`--device cpu --shapes tiny --batches 2 --dtype f32` runs every way on the CPU: a check of this script, not of speed.
"""
import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
WARM_UP = 3


class Peer:
    """Tokenizes by PyTorch."""

    def __init__(self, name, model, device):
        self.name, self.model, self.device = name, model, device
        self.seconds, self.failed = [], None

    def prepare(self, pixels):
        self.pixels = pixels
        for _ in range(WARM_UP):
            self.run()
        self.seconds.clear()

    def run(self):
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.codes = self.model(self.pixels).cpu()
        self.seconds.append(time.perf_counter() - begin)


class Ours:
    """The program, told over stdin; its pixels are the same noise."""

    def __init__(self, worker, batch):
        self.name, self.worker, self.batch, self.seconds, self.failed = "ours", worker, batch, [], None

    def prepare(self, _):
        for _ in range(WARM_UP):
            self.run()
        self.seconds.clear()

    def run(self):
        self.seconds.append(self.worker.ask(f"tokenize {self.batch}")["seconds"])


def peers(folder, dtype, device, skip):
    """PyTorch's ways, by name."""
    import torch
    from model import Tokenizer

    class Bf16Search(Tokenizer):
        def search(self, x):
            h = self.quantizer["linear_in"](x)
            scores = h.flatten(0, 1).bfloat16() @ self.codes.bfloat16().T - self.half_norms.bfloat16()
            return scores.argmax(1).view(h.shape[:2])

    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    exact, quick = (kind(folder, dtype).to(device) for kind in (Tokenizer, Bf16Search))
    made = []
    if "eager" not in skip:
        made.append(Peer("PyTorch eager", exact, device))
    if "compiled" not in skip:
        compiled = lambda model: torch.compile(model, mode="max-autotune", dynamic=False)
        made.append(Peer("PyTorch compiled", compiled(exact), device))
        made.append(Peer("PyTorch compiled, search in bf16", compiled(quick), device))
    return made


def product_rate(dtype, device):
    """Operations a second of a large product, the best of a few."""
    import torch

    n = 8192 if device == "cuda" else 512
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def compare(a, shape, folder):
    import torch
    from bench import Worker, codes_of, digits, header, line
    from nearest_cuda import without_failures
    from worker import inputs

    rate = product_rate(a.dtype, a.device)
    command = [a.program, "bench", "--serve", "--model", folder, "--dtype", a.dtype, "--device", a.device]
    worker = Worker("ours", a.dtype, command, "tokenize")
    operations = worker.answer()["operations"]
    print(f"\n**{shape}** in {a.dtype}; medians of {a.rounds} rounds; a large product: {rate / 1e12:.3g} TFLOP/s\n")
    print(header("batch", "way", "images/s", "TFLOP/s", "share of the product's rate", "ours is faster by", "codes as ours"))
    for batch in a.batches:
        torch._dynamo.reset()
        everyone = [Ours(worker, batch), *peers(folder, a.dtype, a.device, a.skip)]
        pixels = torch.from_numpy(inputs(folder, "tokenize", batch)).to(a.device)
        everyone = without_failures(everyone, lambda way: way.prepare(pixels))
        for _ in range(a.rounds):
            everyone = without_failures(everyone, lambda way: way.run())
        with tempfile.TemporaryDirectory() as scratch:
            ours = torch.from_numpy(codes_of([worker], folder, pathlib.Path(scratch), batch)["ours", a.dtype].astype("int64"))
        fastest = {way.name: statistics.median(way.seconds) for way in everyone}
        for way in everyone:
            seconds = fastest[way.name]
            same = "–" if way.name == "ours" else f"{(way.codes.view(batch, -1) == ours).float().mean().item():.2%}"
            reached = operations * batch / seconds
            print(line(batch, way.name, digits(batch / seconds), digits(reached / 1e12), f"{reached / rate:.0%}",
                       f"{seconds / fastest['ours']:.2f}", same), flush=True)
    worker.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(",")
    parser.add_argument("--shapes", type=words, default=["siglip-large"])
    parser.add_argument("--batches", type=lambda text: [int(word) for word in text.split(",")], default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=("bf16", "f16", "f32"), default="bf16")
    parser.add_argument("--skip", type=words, default=[], help="eager, compiled")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--program", type=lambda path: pathlib.Path(path).resolve(),
                        default=HERE.parents[1] / "target" / "release" / "vqrae-cli")
    a = parser.parse_args()
    import torch

    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("high")
    sys.path.insert(0, str(HERE))
    for shape in a.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch) / "model"
            subprocess.run([a.program, "bench", "--shapes", shape, "--export", folder], check=True)
            compare(a, shape, folder)


if __name__ == "__main__":
    main()
