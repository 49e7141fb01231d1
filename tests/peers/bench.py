"""Ours beside PyTorch, OpenVINO and ONNX Runtime: the same weights, the same pixels, in turns on one machine.

    cargo build --release -p vqrae-cli
    python tests/peers/bench.py [--shapes shipped,siglip-large,nearest] [--batches 1,4,8] [--rounds 3] [--only openvino]
        [--cache FOLDER]

Needs torch, safetensors, numpy, openvino, onnxruntime, onnx; a peer that is not installed or fails is left out with the reason
on stderr. Every peer is a process of its own that sleeps until it is told to run: round after round, one after the other, so
that a slow minute of the machine hits them all. Shown is the best round of each, and the peak memory of a process that only
tokenizes or only reconstructs, all that it needs to load the model included. Prints Markdown.
"""
import argparse
import json
import math
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PRECISIONS = ("f32", "bf16")
PEERS = {  # the columns of the tables, and the workers that each is the best of
    "PyTorch": ("pytorch",),
    "PyTorch compiled": ("compiled",),
    "OpenVINO": ("openvino", "openvino_requests"),
    "ONNX Runtime": ("onnxruntime",),
}
UNITS = {"tokenize": "tokenize, images/s", "reconstruct": "reconstruct, images/s"}


class Worker:
    """A process that answers a line with a line of JSON."""

    def __init__(self, name: str, precision: str, command: list, what: str):
        self.name, self.precision, self.what, self.ours = name, precision, what, name == "ours"
        self.log = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen([str(word) for word in command], text=True, cwd=HERE, **pipes)
        self.seconds, self.peaks = {}, {}

    def answer(self, limit: float = 600) -> dict:
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.log.seek(0)
        reason = (self.log.read().strip() or f"no answer within {limit} s").splitlines()[-1]
        raise RuntimeError(f"{self.name} {self.precision} {self.what}: {reason}")

    def ask(self, order: str) -> dict:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.answer()

    def run(self, batch: int) -> float:
        done = self.ask(f"{self.what} {batch}" if self.ours else str(batch))
        self.peaks[batch] = done["peak_mib"]
        return done["seconds"]

    def turn(self, batch: int, pause: float = 0.25):
        """The best of as many runs as fit into half a second, once the threads of the one before sleep."""
        time.sleep(pause)
        spent = 0
        while spent < 0.5:
            seconds = self.run(batch)
            spent += seconds
            self.seconds[batch] = min(seconds, self.seconds.get(batch, math.inf))

    def close(self):
        self.process.kill()
        self.process.wait()


def without_failures(workers: list, do) -> list:
    """Those that could do it; the others are closed and named."""
    left = []
    for worker in workers:
        try:
            do(worker)
            left.append(worker)
        except (RuntimeError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
            worker.close()
    return left


def compare(workers: list, batches: list, rounds: int, at_end=lambda workers, batch: None) -> list:
    workers = without_failures(workers, lambda worker: worker.answer())
    for batch in batches:
        workers = without_failures(workers, lambda worker: worker.run(batch))
        for _ in range(rounds):
            workers = without_failures(workers, lambda worker: worker.turn(batch))
        at_end(workers, batch)
        print(f"{workers[0].what} {batch}:", *(f"{w.name}/{w.precision}={batch / w.seconds[batch]:.3g}" for w in workers),
              file=sys.stderr, flush=True)
    for worker in workers:
        worker.close()
    return workers


def codes_of(workers: list, folder: pathlib.Path, scratch: pathlib.Path, batch: int) -> dict:
    """The codes of the last batch."""
    from safetensors.numpy import load_file, save_file
    from worker import inputs

    save_file({"pixels": inputs(folder, "tokenize", batch)}, scratch / "pixels.safetensors")
    codes = {}
    for worker in workers:
        if worker.ours:
            worker.ask(f"dump {scratch}/pixels.safetensors {scratch}/out.safetensors")
            out = load_file(scratch / "out.safetensors")["indices"]
        else:
            worker.ask(f"keep {scratch}/out.npy")
            out = np.load(scratch / "out.npy")
        codes[worker] = out.reshape(batch, -1)
    return {(w.name, w.precision): c for w, c in codes.items()}


def line(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def header(*cells) -> str:
    return line(*cells) + "\n" + "|" + "---|" * len(cells)


def digits(x: float) -> str:
    return "–" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def one_model(shape: str, a, scratch: pathlib.Path):
    place = (a.cache or scratch) / shape
    folder, models = place / "model", place / "converted"
    if shape == "shipped":
        folder = ROOT / "weights" / "vqrae-small"
    elif not (folder / "model.safetensors").exists():
        subprocess.run([a.program, "bench", "--shapes", shape, "--export", folder], check=True)
    columns = {name: peers for name, peers in PEERS.items() if not a.only or set(peers) & set(a.only)}
    if {"OpenVINO", "ONNX Runtime"} & set(columns) and not models.exists():
        models.mkdir(parents=True)
        subprocess.run([sys.executable, HERE / "worker.py", "convert", folder, models],
                       stdout=sys.stderr, stderr=subprocess.DEVNULL)

    best, peaks, same = {}, {}, {}

    def at_end(workers, batch):
        if workers[0].what == "tokenize" and batch == a.batches[-1]:
            same.update(codes_of(workers, folder, scratch, batch))

    for what, precision in ((what, precision) for what in UNITS for precision in PRECISIONS):
        command = [a.program, "bench", "--serve", "--device", "cpu", "--model", folder, "--dtype", precision]
        workers = [Worker("ours", precision, command, what)]
        for peer in (peer for peers in columns.values() for peer in peers):
            if (peer, precision) != ("onnxruntime", "bf16") and (not a.only or peer in a.only):
                command = [sys.executable, HERE / "worker.py", peer, precision, what, folder, models]
                workers.append(Worker(peer, precision, command, what))
        for w in compare(workers, a.batches, a.rounds, at_end):
            for batch in a.batches:
                best[what, batch, w.precision, w.name] = batch / w.seconds[batch]
                peaks[what, batch, w.precision, w.name] = w.peaks[batch]

    print(f"\n**{shape}**, best of {a.rounds} rounds; codes equal to ours in f32 at batch {a.batches[-1]}:",
          ", ".join(f"{name} {precision} {(codes == same['ours', 'f32']).mean():.2%}"
                    for (name, precision), codes in same.items()) + "\n")
    print(header("what", "batch", "numbers", "ours", *columns, "ours ÷ best peer"))
    rows = [(what, batch, precision) for what in UNITS for batch in a.batches for precision in PRECISIONS]
    for what, batch, precision in rows:
        values = [max((best.get((what, batch, precision, p), 0) for p in peers), default=0) for peers in columns.values()]
        ours, top = best[what, batch, precision, "ours"], max(values, default=0)
        ratio = f"{ours / top:.2f}" if top else "–"
        print(line(UNITS[what], batch, precision, digits(ours), *(digits(v or None) for v in values), ratio))
    for what, batch, precision in (row for row in rows if row[1] in (a.batches[0], a.batches[-1])):
        values = [min((peaks.get((what, batch, precision, p), math.inf) for p in peers)) for peers in columns.values()]
        ours, least = peaks[what, batch, precision, "ours"], min(values, default=math.inf)
        ratio = f"{ours / least:.2f}" if least < math.inf else "–"
        cells = (f"{v:,}" if v < math.inf else "–" for v in values)
        print(line(f"{what}, peak MiB", batch, precision, f"{ours:,}", *cells, ratio), flush=True)


def nearest(a, scratch: pathlib.Path):
    """1,024 tokens in 16,384 codes of width 1,536 by cosine."""
    import torch
    from safetensors.torch import load_file

    batch, file = 4, scratch / "nearest.safetensors"
    ours = Worker("ours", "exact", [a.program, "bench", "--serve", "--device", "cpu", "--shapes", "nearest"], "tokenize")
    ours.answer()
    ours.ask(f"dump {file}")
    ours.close()
    workers = [Worker("ours", "exact", [a.program, "bench", "--serve", "--device", "cpu", "--shapes", "nearest"], "tokenize")]
    for precision in PRECISIONS:
        command = [sys.executable, HERE / "worker.py", "nearest", precision, "nearest", file, scratch]
        workers.append(Worker("nearest", precision, command, "nearest"))

    data = load_file(file)
    n = 256 * batch
    truth = (data["tokens"][:n].double() @ data["codes"].double().T).argmax(1).numpy()
    codes = {"exact": data["indices"][:n].numpy()}

    def keep(workers, _):
        for worker in (w for w in workers if not w.ours):
            worker.ask(f"keep {scratch}/out.npy")
            codes[worker.precision] = np.load(scratch / "out.npy")

    done = compare(workers, [batch], a.rounds, keep)
    print(f"\n**Nearest code**, {n:,} tokens, 16,384 codes of width 1,536, cosine, best of {a.rounds} rounds\n")
    print(header("what", "ms", "ours is faster by", "wrong codes of 1,024", "peak MiB"))
    for worker in done:
        name = "ours, exact" if worker.ours else f"PyTorch {worker.precision}, (z @ c.T).argmax(1)"
        ratio = worker.seconds[batch] / done[0].seconds[batch]
        wrong = int((codes[worker.precision] != truth).sum())
        print(line(name, f"{worker.seconds[batch] * 1e3:.0f}", f"{ratio:.2f}", wrong, worker.peaks[batch]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(",")
    parser.add_argument("--shapes", type=words, default=["shipped", "siglip-large", "nearest"])
    parser.add_argument("--batches", type=lambda text: sorted(map(int, text.split(","))), default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=words, default=[], help="peers: " + ", ".join(p for ps in PEERS.values() for p in ps))
    parser.add_argument("--cache", type=lambda path: pathlib.Path(path).resolve(),
                        help="folder to keep exported and converted models in, for another run")
    suffix = ".exe" if os.name == "nt" else ""
    parser.add_argument("--program", type=lambda path: pathlib.Path(path).resolve(),
                        default=ROOT / "target" / "release" / f"vqrae-cli{suffix}")
    a = parser.parse_args()
    for shape in a.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            nearest(a, pathlib.Path(scratch)) if shape == "nearest" else one_model(shape, a, pathlib.Path(scratch))


if __name__ == "__main__":
    main()
