"""LPIPS of ours beside PyPI lpips on photos and their JPEGs, and ConvNeXt-S's logits beside torchvision's: values, gradients, seconds.

    cargo build --release -p vqrae-cli
    python weights/convert_lpips.py LPIPS
    python tests/peers/perceptual.py LPIPS examples/photos [--side 256] [--batch 4]

Needs torch, torchvision, lpips, safetensors, numpy, pillow. lpips holds its heads; the backbones, which it would download, are
those of the converted files. ConvNeXt-S is random: its true weights are in no package. A gradient's difference is ‖ours −
theirs‖ ÷ ‖theirs‖, in f32; one ReLU that decides otherwise in PyTorch's f32 than in its f64 makes 1e-3 of it. Seconds are of both images forwards and one backwards, the least of three, on as many threads as ours
takes. Prints Markdown, and exits with 1 if a value differs by more than 1e-4.
"""
import argparse
import io
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from accuracy import photos
from bench import ROOT, header, line

QUALITIES = [95, 50, 20, 5]
MOST_DIFFERENCE = 1e-4
ROUNDS = 3


def pair(file: pathlib.Path, side: int, quality: int):
    """The middle square in 8 bit, and what a JPEG makes of it, [3, side, side] each."""
    image = Image.open(file).convert("RGB")
    s = min(image.size)
    left, top = (image.width - s) // 2, (image.height - s) // 2
    image = image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + s, top + s))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    tensor = lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    return tensor(image), tensor(Image.open(buffer))


def ours(program, network, weights, images, others):
    with tempfile.TemporaryDirectory() as scratch:
        files = [f"{scratch}/in.safetensors", f"{scratch}/out.safetensors"]
        save_file({"images": images.contiguous(), "others": others.contiguous().clone()}, files[0])
        order = " ".join(map(str, ["perceptual", network, weights, *files])) + "\n"
        done = subprocess.run([program, "bench", "--serve", "--device", "cpu", "--shapes", "shipped"], input=order * ROUNDS, text=True, check=True, capture_output=True)
        seconds = [float(line.split('"seconds":')[1].split(",")[0]) for line in done.stdout.splitlines()[1:]]
        out = load_file(files[1])
    return out["values"], out["gradient"], min(seconds)


def theirs(model, images):
    seconds = []
    for _ in range(ROUNDS):
        x, begin = images.clone().requires_grad_(), time.perf_counter()
        values = model(x)
        values.sum().backward()
        seconds.append(time.perf_counter() - begin)
    return values.detach(), x.grad, min(seconds)


def off(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def pypi(network: str, weights: pathlib.Path):
    import lpips

    model = lpips.LPIPS(net={"vgg16": "vgg"}.get(network, network), pnet_rand=True, verbose=False)
    tensors = load_file(weights)
    for i in range(1, 6):
        for name, layer in getattr(model.net, f"slice{i}").named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.data, layer.bias.data = tensors[f"features.{name}.weight"], tensors[f"features.{name}.bias"]
    return model.eval().requires_grad_(False)


def convnext(file: pathlib.Path):
    torch.manual_seed(0)
    model = torchvision.models.convnext_small().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "layer_scale" in name:
            p.fill_(0.3)
    save_file(model.state_dict(), file)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resize = lambda x: torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", align_corners=False, antialias=True)
    return lambda x: model((resize(x) - mean) / std)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=pathlib.Path, help="the folder that weights/convert_lpips.py made")
    parser.add_argument("photos", nargs="+", type=pathlib.Path, help="images, or folders of them")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="photos to take")
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target" / "release" / "vqrae-cli")
    a = parser.parse_args()
    files = photos(a.photos, a.batch)
    if not files:
        parser.error("no photos there")
    print(f"{len(files)} photos at {a.side}×{a.side}: {', '.join(f.name for f in files)}; PyTorch {torch.__version__}\n")
    print(header("", "quality", "ours", "PyTorch", "largest difference", "gradients differ by", "ours, s", "PyTorch, s"))
    worst = 0.0
    for network in ("vgg16", "alex"):
        weights = a.weights / f"lpips_{network}.safetensors"
        model = pypi(network, weights)
        for quality in QUALITIES:
            images, others = (torch.stack(x).float() / 127.5 - 1 for x in zip(*(pair(f, a.side, quality) for f in files)))
            got, got_slope, seconds = ours(a.program, network, weights, others, images)
            real, slope, their_seconds = theirs(lambda x: model(x, images).flatten(), others)
            worst = max(worst, float((got - real).abs().max()))
            shown = lambda values: ", ".join(f"{v:.4f}" for v in values)
            print(line(f"LPIPS, {network}", quality, shown(got), shown(real), f"{(got - real).abs().max():.1e}",
                       f"{off(got_slope, slope):.1e}", f"{seconds:.2f}", f"{their_seconds:.2f}"))
    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch) / "convnext.safetensors"
        model = convnext(file)
        images = torch.stack([pair(f, a.side, 95)[0] for f in files]).float() / 255
        got, got_slope, seconds = ours(a.program, "convnext", file, images, images)
        real, slope, their_seconds = theirs(model, images)
        print(line("ConvNeXt-S, one way", "", "", "", f"{off(got, real):.1e} of the norm", f"{off(got_slope, slope):.1e}",
                   f"{seconds:.2f}", f"{their_seconds:.2f}"))
    sys.exit(worst > MOST_DIFFERENCE)


if __name__ == "__main__":
    main()
