"""The search for the nearest code beside PyTorch and Triton: the same codes and tokens, in turns, in one run.

    cargo build --release --features cuda
    python tests/peers/nearest_cuda.py [--tokens 1024,8192] [--widths 8,64,1536] [--codes 16384] [--inputs random,cone]
        [--rounds 20] [--skip compiled] [--device cuda]

Needs torch, numpy, safetensors, and triton for the kernel of streaming.py. Ours is a process of its own that has four sets of tokens
take turns, as PyTorch's here do. Tokens and codes are given to PyTorch in the precision that it multiplies in, those for cdist of
length 1: neither is timed. Times are medians; on a GPU they are those of its own clock, with what the host has to wait for in
between. Codes are compared with the argmax of PyTorch's products in binary64, all of them. Exits with 1 if one of ours differs.

`--device cpu --tokens 512 --widths 40 --codes 300` runs every way on the CPU, the Triton kernel by its interpreter
(TRITON_INTERPRET=1): a check of this script, not of speed.
"""
import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
SETS = 4
WARM_UP = 3


def precision(name):
    """How f32 is multiplied: `highest` is f32, `high` is tf32."""
    import torch

    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")


def by_scores(z, c):
    import torch

    return torch.einsum("nd,kd->nk", z, c).argmax(1)


def by_distance(z, c):
    import torch

    return torch.cdist(z, c).argmin(1)


class Way:
    """One way of finding the codes, of PyTorch or Triton, on tensors of one precision."""

    def __init__(self, name, number, search, device, unit=False):
        self.name, self.number, self.search, self.device, self.unit = name, number, search, device, unit
        self.seconds, self.peak, self.failed = [], None, None

    def prepare(self, tokens, codes):
        import torch
        import torch.nn.functional as F

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.number, torch.float32)
        tokens = F.normalize(tokens) if self.unit else tokens
        if self.number == "fp16":
            # Within fp16's range and without subnormals; the argmax does not change.
            tokens = tokens / tokens.abs().amax(1, keepdim=True)
        tokens = tokens.to(dtype)
        self.sets = [torch.roll(tokens, i, 0).contiguous() if i else tokens for i in range(SETS)]
        self.codes, self.turn = codes.to(dtype), 0
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        for _ in range(WARM_UP):
            self.run()
        self.seconds.clear()
        if self.device == "cuda":
            self.peak = (torch.cuda.max_memory_allocated() - self.before) / 2**20

    def run(self):
        import torch

        precision(self.number)
        z = self.sets[self.turn % SETS]
        self.turn += 1
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            self.search(z, self.codes)
            end.record()
            end.synchronize()
            self.seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            self.search(z, self.codes)
            self.seconds.append(time.perf_counter() - begin)

    def found(self):
        precision(self.number)
        return self.search(self.sets[0], self.codes).long()


class Ours:
    """The program, told `verb` over stdin."""

    def __init__(self, worker, name, verb, n):
        self.worker, self.name, self.number, self.verb, self.n = worker, f"ours, {name}", "", verb, n
        self.seconds, self.peak, self.failed = [], None, None

    def prepare(self, *_):
        for _ in range(WARM_UP):
            self.run()
        self.seconds.clear()

    def run(self):
        # 256 tokens are an image's.
        self.seconds.append(self.worker.ask(f"{self.verb} {self.n // 256}")["seconds"])


def ways(device, skip):
    import torch

    def compiled(search):
        return torch.compile(search, mode="max-autotune", dynamic=False)

    made = []
    for kind, wrap in (("eager", lambda search: search), ("compiled", compiled)):
        if kind in skip:
            continue
        for number in ("bf16", "fp16", "tf32", "fp32"):
            made.append(Way(f"PyTorch {kind}, einsum and argmax", number, wrap(by_scores), device))
        made.append(Way(f"PyTorch {kind}, cdist and argmin", "fp32", wrap(by_distance), device, unit=True))
    if "triton" not in skip:
        try:
            from streaming import nearest

            processors = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 4
            made.append(Way("Triton, streaming argmax", "fp16", lambda z, c: nearest(z, c, processors), device))
        except ImportError as error:
            print(f"left out: Triton: {error}", file=sys.stderr)
    return made


def truth(tokens, codes):
    """The argmax of the products in binary64."""
    import torch

    codes = codes.double().T
    return torch.cat([(part.double() @ codes).argmax(1) for part in tokens.split(4096)])


def without_failures(ways, do):
    for way in ways:
        if way.failed is None:
            try:
                do(way)
            except Exception as error:
                way.failed = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
                print(f"left out: {way.name} {way.number}: {way.failed}", file=sys.stderr, flush=True)
    return [way for way in ways if way.failed is None]


def compare(a, inputs, n, d) -> int:
    """Prints one table, and returns how many of our exact codes are wrong."""
    import torch
    from bench import Worker, digits, header, line
    from safetensors.torch import load_file

    command = [a.program, "bench", "--serve", "--shapes", "nearest", "--device", a.device, "--codes", a.codes, "--widths", d,
               "--tokens", n, "--inputs", inputs]
    worker = Worker("ours", "exact", command, "tokenize")
    worker.answer()
    with tempfile.TemporaryDirectory() as scratch:
        worker.ask(f"dump {scratch}/data.safetensors")
        data = {name: tensor.to(a.device) for name, tensor in load_file(f"{scratch}/data.safetensors").items()}
    tokens, codes = data["tokens"], data["codes"]
    (k, d), expected = codes.shape, truth(tokens, codes)
    wrong = lambda found: int((found.long().to(expected.device) != expected).sum())

    ours = [Ours(worker, "exact", "tokenize", n)]
    if "fast" in data:
        ours += [Ours(worker, "fast", "fast", n), Ours(worker, "cuBLAS fp16 alone", "products", n)]
    torch._dynamo.reset()
    everyone = without_failures(ours + ways(a.device, a.skip), lambda way: way.prepare(tokens, codes))
    for _ in range(a.rounds):
        everyone = without_failures(everyone, lambda way: way.run())

    print(f"\n**{inputs}**: {n:,} tokens, {k:,} codes of width {d}, cosine; medians of {a.rounds} rounds\n")
    print(header("way", "numbers", "ms", "TFLOP/s", "ours, exact, is faster by", f"wrong codes of {n:,}", "MiB taken"))
    median = {way: statistics.median(way.seconds) for way in everyone}
    results = {"ours, exact": data["indices"], "ours, fast": data.get("fast")}
    mistakes = 0
    for way in everyone:
        found = results.get(way.name) if isinstance(way, Ours) else way.found()
        missed = None if found is None else wrong(found)
        mistakes += missed if way.name == "ours, exact" else 0
        rate, ratio = 2 * n * k * d / median[way] / 1e12, median[way] / median[ours[0]]
        print(line(way.name, way.number, digits(median[way] * 1e3), digits(rate), f"{ratio:.2f}",
                   "–" if missed is None else missed, digits(way.peak)), flush=True)
    worker.close()
    return mistakes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(",")
    numbers = lambda text: [int(word) for word in text.split(",")]
    parser.add_argument("--tokens", type=numbers, default=[1024, 8192, 65536], help="multiples of 256")
    parser.add_argument("--widths", type=numbers, default=[8, 64, 256, 1536])
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--inputs", type=words, default=["random", "cone", "power-law", "shipped"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--skip", type=words, default=[], help="eager, compiled, triton")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--program", type=lambda path: pathlib.Path(path).resolve(),
                        default=HERE.parents[1] / "target" / "release" / "vqrae-cli")
    a = parser.parse_args()
    if any(n % 256 for n in a.tokens):
        parser.error("--tokens: expected multiples of 256")
    if a.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    torch.set_grad_enabled(False)
    sys.path.insert(0, str(HERE))
    mistakes = 0
    for inputs in a.inputs:
        # A shipped codebook has one width, its own.
        for d in a.widths[:1] if inputs == "shipped" else a.widths:
            for n in a.tokens:
                mistakes += compare(a, inputs, n, d)
    if mistakes:
        sys.exit(f"{mistakes} of our exact codes are not those of binary64")


if __name__ == "__main__":
    main()
