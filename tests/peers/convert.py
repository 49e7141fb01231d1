"""Converted checkpoints beside the projects that they are of: features, codes and pixels through the command line.

    cargo build --release -p vqrae-cli
    python tests/peers/convert.py FORK RAE [--width 128]

FORK and RAE are checkouts of hugoycj/RAE and bytetriper/RAE. Needs what tests/fixtures/convert/make.py needs, and pillow.
Random weights, sizes between the fixtures' and real ones, heads derived from the widths. Prints, for every kind of checkpoint,
the worst difference of a feature over the largest feature, how many codes differ, and by how many of 255 a pixel differs at most
(both are rounded, so 1 is none); exits with 1 beyond 1e-4, a code, or 1.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLI = ROOT / "target/release/vqrae-cli"
sys.path.insert(0, str(ROOT / "tests/fixtures/convert"))
CASES = ["fork-siglip", "fork-dinov2", "fork-mae", "fork-siglip-vq", "fork-dinov2-vq", "rae-mae", "diffusers-rae-siglip2",
         "diffusers-rae-dinov2", "diffusers-rae-mae"]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # diffusers' default; make.py gives the others 0.5


def make_checkpoint(case: str, source: str, out: pathlib.Path, width: int):
    """In a process of its own: two of the projects have packages of one name."""
    import make
    make.HERE, make.D, make.HEADS, make.MLP, make.PATCH, make.PAINTED, make.SIDE, make.CODES = out, width, width // 64, width * 3, 16, 16, 8, 1024
    make.ENCODER.update(hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=4, intermediate_size=width * 3)
    make.DECODER.update(decoder_hidden_size=width + 64, decoder_num_attention_heads=width // 64 + 1, decoder_intermediate_size=width * 4)
    if case.startswith("diffusers"):
        make.diffusers(case.split("-")[-1])
    else:
        make.project(source, case)


def run(*words):
    subprocess.run([CLI, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def compare(case: str, folder: pathlib.Path) -> tuple:
    source = folder / case
    reference = load_file(source / "reference.safetensors")
    norm = IMAGENET if case.startswith("diffusers") else ([0.5] * 3, [0.5] * 3)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in norm)
    whole = "tokens" in reference

    def eight_bits(x):
        return ((x * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    (folder / "photos").mkdir()
    Image.fromarray(eight_bits(reference["pixels"][0])).save(folder / "photos/x.png")
    checkpoint = source / "checkpoint.pt"
    options = [] if whole else ["--set", "quantizer.codebook_size=64", "--set", "quantizer.type=simvq"]
    # What normalises random pixels is the reference's own.
    processor = folder / "preprocessor_config.json"
    side = reference["pixels"].shape[-1]
    processor.write_text(str(dict(image_mean=mean.flatten().tolist(), image_std=std.flatten().tolist(), resample=3,
                                  size=dict(height=side, width=side))).replace("'", '"'))
    run("convert", checkpoint if checkpoint.exists() else source, "-o", folder / "model", "--preprocessor", processor, *options)
    shared = ["--model", folder / "model", "--dtype", "f32"]
    run("features", folder / "photos", "-o", folder / "features", *shared)
    features = load_file(folder / "features/features/x.png.safetensors")["features"]
    expected = reference["features"][0]
    feature = ((features - expected).abs().max() / expected.abs().max()).item()
    if not whole:
        return feature, None, None
    run("tokenize", folder / "photos", "-o", folder / "codes", "--reconstruct", *shared)
    codes = load_file(folder / "codes/codes/x.png.safetensors")["codes"].flatten()
    differ = (codes != reference["indices"][0].int()).sum().item()
    painted = np.asarray(Image.open(folder / "codes/reconstructions/x.png.png")).astype(int)
    pixel = int(np.abs(painted - eight_bits(reference["image"][0]).astype(int)).max())
    return feature, differ, pixel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fork")
    parser.add_argument("rae")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--make", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        case, out = args.make
        source = args.fork if case.startswith("fork") else args.rae
        return make_checkpoint(case, source, pathlib.Path(out), args.width)
    good = True
    print("| checkpoint | features | codes that differ | pixels, of 255 |\n|---|---|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, args.fork, args.rae, "--width", str(args.width), "--make", case, folder]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            feature, codes, pixel = compare(case, pathlib.Path(folder))
        print(f"| {case} | {feature:.1e} | {'–' if codes is None else codes} | {'–' if pixel is None else pixel} |", flush=True)
        good &= feature <= 1e-4 and (codes or 0) == 0 and (pixel or 0) <= 1
    sys.exit(not good)


if __name__ == "__main__":
    main()
