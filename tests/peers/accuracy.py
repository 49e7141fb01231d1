"""What 16 bits cost: bf16 against f32, ours beside PyTorch's, on the same pixels.

    cargo build --release -p vqrae-cli
    python tests/peers/accuracy.py PHOTOS… [--shapes shipped,siglip-base] [--count 32]

Needs torch, safetensors, numpy, pillow. PyTorch's bf16 is everything in bf16 but the search for the nearest code; its second
column has the projection before the search in f32 too. A hidden state's error is ‖h_bf16 − h_f32‖ ÷ ‖h_f32‖ of an image, and the
largest difference of an element ÷ the root mean square of h_f32; shown is the worst image. Prints Markdown, and exits with 1 if
ours in bf16 is worse than PyTorch's, or ours in f32 is not PyTorch's in f32.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from bench import ROOT, header, line
from model import Painter, Tokenizer

BATCH = 4
MOST_DIFFERING_SHARE = 1.05  # of PyTorch's: which near-ties flip is chance
MOST_ERROR = 1.0
MOST_ERROR_F32 = 1e-4


def photos(places: list, count: int) -> list:
    endings = {".jpg", ".jpeg", ".png", ".webp"}
    files = [f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*")))]
    return [f for f in files if f.suffix.lower() in endings][:count]


def pixels(file: pathlib.Path, side: int) -> np.ndarray:
    """The middle square in 8 bit, [3, side, side]."""
    image = Image.open(file).convert("RGB")
    w, h = image.size
    s = min(w, h)
    box = ((w - s) // 2, (h - s) // 2, (w + s) // 2, (h + s) // 2)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)


def ours(program, folder, dtype, x, scratch) -> dict:
    save_file({"pixels": np.ascontiguousarray(x)}, scratch / "in.safetensors")
    command = [program, "bench", "--serve", "--device", "cpu", "--model", folder, "--dtype", dtype]
    orders = f"dump {scratch}/in.safetensors {scratch}/out.safetensors\n"
    done = subprocess.run(list(map(str, command)), input=orders, text=True, check=True, capture_output=True)
    out = load_file(scratch / "out.safetensors")
    precision = json.loads(done.stdout.splitlines()[0])["precision"]
    return {"states": out["hidden_states"], "codes": out["indices"].reshape(len(x), -1), "image": out["pixels_out"], "name": precision}


def pytorch(tokenizer, painter, x, search_in_f32=False) -> dict:
    states = tokenizer.hidden_states(torch.from_numpy(x))
    features = tokenizer.finish(states[-1])
    codes = tokenizer.search(features.float() if search_in_f32 else features)
    image = painter(codes).numpy()
    return {"states": torch.stack(states).float().numpy(), "codes": codes.numpy(), "image": image}


def errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of states [L, B, N, D] per state and image: relative error, and largest difference against the root mean square."""
    a, b = (x.reshape(*x.shape[:2], -1).astype(np.float64) for x in (a, b))
    rms = np.sqrt((b**2).mean(2))
    return np.stack([np.linalg.norm(a - b, axis=2) / np.linalg.norm(b, axis=2), np.abs(a - b).max(2) / rms])


def psnr(image: np.ndarray, original: np.ndarray) -> np.ndarray:
    image = np.clip(np.round((image / 2 + 0.5) * 255), 0, 255)
    return 10 * np.log10(255**2 / ((image - original) ** 2).reshape(len(image), -1).mean(1))


def measure(folder: pathlib.Path, files: list, program, scratch: pathlib.Path):
    """Every way of computing against its f32: worst errors [2, L], share of codes, mean PSNR."""
    side = json.loads((folder / "config.json").read_text())["encoder"]["image_size"]
    f32, bf16 = ({w: h(folder, t) for w, h in (("t", Tokenizer), ("p", Painter))} for t in (torch.float32, torch.bfloat16))
    bf16_f32 = Tokenizer(folder, torch.bfloat16)
    bf16_f32.quantizer["linear_in"].load_state_dict(f32["t"].quantizer["linear_in"].state_dict(), assign=True)
    worst, differing, decibels, total, names = {}, {}, {}, 0, {}
    for start in range(0, len(files), BATCH):
        original = np.stack([pixels(file, side) for file in files[start : start + BATCH]])
        x = original.astype(np.float32) / 127.5 - 1
        runs = {
            "ours f32": ours(program, folder, "f32", x, scratch),
            "ours bf16": ours(program, folder, "bf16", x, scratch),
            "PyTorch f32": pytorch(f32["t"], f32["p"], x),
            "PyTorch bf16": pytorch(bf16["t"], bf16["p"], x),
            "PyTorch bf16, projection f32": pytorch(bf16_f32, bf16["p"], x, search_in_f32=True),
        }
        names = {name: run["name"] for name, run in runs.items() if "name" in run}
        total += runs["ours f32"]["codes"].size
        for name, run in runs.items():
            reference = runs["PyTorch f32" if name == "ours f32" else name.split()[0] + " f32"]
            worst[name] = np.maximum(worst.get(name, 0), errors(run["states"], reference["states"]).max(2))
            differing[name] = differing.get(name, 0) + int((run["codes"] != reference["codes"]).sum())
            decibels.setdefault(name, []).extend(psnr(run["image"], original))
    shares = {name: count / total for name, count in differing.items()}
    return worst, shares, {name: float(np.mean(values)) for name, values in decibels.items()}, names


def report(shape: str, files: list, worst, shares, decibels, names) -> list:
    print(f"\n**{shape}**, {len(files)} photos; ours in {names['ours f32']} and {names['ours bf16']}. "
          "PyTorch and bf16 against their own f32, ours f32 against PyTorch f32\n")
    columns = ["ours f32", "ours bf16", "PyTorch bf16", "PyTorch bf16, projection f32"]
    print(header("", *columns))
    print(line("codes that differ", *(f"{shares[c]:.3%}" for c in columns)))
    if shape == "shipped":
        print(line("PSNR, dB", *(f"{decibels[c]:.3f}" for c in columns)))
        print(line("… against f32", *(f"{decibels[c] - decibels[c.split()[0] + ' f32']:+.4f}" for c in columns)))
    for i, what in enumerate(("relative error", "largest difference ÷ rms")):
        print(line(f"worst {what}", *(f"{worst[c][i].max():.2e}" for c in columns)))
    for layer in range(worst["ours f32"].shape[1]):
        name = f"after block {layer}" if layer else "embedding"
        print(line(name, *(f"{worst[c][0, layer]:.2e}, {worst[c][1, layer]:.2e}" for c in columns)))

    failures = []
    if worst["ours f32"][0].max() > MOST_ERROR_F32:
        failures.append(f"ours f32 differs from PyTorch f32 by {worst['ours f32'][0].max():.2e}")
    if worst["ours bf16"][0].max() > MOST_ERROR * worst["PyTorch bf16"][0].max():
        failures.append("ours bf16 has a larger relative error than PyTorch bf16")
    chance = 2 / (len(files) * 256)
    if shares["ours bf16"] > MOST_DIFFERING_SHARE * shares["PyTorch bf16"] + chance:
        failures.append("ours bf16 changes more codes than PyTorch bf16")
    return [f"{shape}: {failure}" for failure in failures]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=pathlib.Path, help="images, or folders of them")
    parser.add_argument("--count", type=int, default=32, help="photos of them to take")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["shipped", "siglip-base"])
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target" / "release" / "vqrae-cli")
    a = parser.parse_args()
    torch.set_grad_enabled(False)
    files, failures = photos(a.photos, a.count), []
    if not files:
        parser.error("no photos there")
    for shape in a.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = ROOT / "weights" / "vqrae-small"
            if shape != "shipped":
                folder = pathlib.Path(scratch) / "model"
                subprocess.run([a.program, "bench", "--shapes", shape, "--export", folder], check=True)
            failures += report(shape, files, *measure(folder, files, a.program, pathlib.Path(scratch)))
    for failure in failures:
        print(f"worse: {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
