"""What models' reconstructions are worth on held-out photos, by other people's code: PSNR and SSIM of scikit-image, LPIPS of
PyPI's lpips.

    cargo build --release -p vqrae-cli
    python weights/convert_lpips.py LPIPS          # its head says what it needs
    python tests/peers/quality.py --lpips LPIPS/lpips_vgg16.safetensors --photos VAL [--train TRAIN] MODEL…

Needs torch, torchvision, lpips, scikit-image, safetensors, numpy, pillow. VAL and TRAIN are folders; a MODEL is a folder, or
`shipped`. A photo's short side becomes 256 (bicubic), its middle square is reconstructed and saved in 8 bit; shown are means
over the photos. SSIM: Gaussian windows, σ = 1.5, data range 255, over the three channels. Usage and perplexity are those of
all codes of TRAIN. Prints Markdown.
"""
import argparse
import pathlib
import subprocess
import tempfile

import lpips
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "target/release/vqrae-cli"
SIDE = 256


def network(weights: pathlib.Path, net: str = "vgg"):
    """LPIPS; the package's own code with the weights of a file, since it would download its backbone."""
    model = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
    tensors = load_file(weights)
    own = [f"net.slice{i}.{name}" for i in range(1, 6) for name, _ in getattr(model.net, f"slice{i}").named_parameters()]
    state = {name: tensors["features." + name.split(".", 2)[2]] for name in own}
    for i in range(5):
        state[f"lin{i}.model.1.weight"] = state[f"lins.{i}.model.1.weight"] = tensors[f"lin{i}.weight"]
    missing = [k for k in model.load_state_dict(state, strict=False).missing_keys if not k.startswith("scaling")]
    assert not missing, missing
    return model.eval()


def original(file: pathlib.Path) -> np.ndarray:
    image = Image.open(file).convert("RGB")
    factor = SIDE / min(image.size)
    if factor != 1:
        image = image.resize([max(SIDE, int(side * factor)) for side in image.size], Image.BICUBIC)
    left, top = ((side - SIDE) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def program(*words) -> str:
    return subprocess.run([PROGRAM, *map(str, words)], check=True, capture_output=True, text=True).stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--photos", type=pathlib.Path, required=True)
    parser.add_argument("--train", type=pathlib.Path)
    parser.add_argument("--lpips", type=pathlib.Path, required=True)
    parser.add_argument("--dtype", default="f32")
    args = parser.parse_args()
    distance = network(args.lpips)
    files = sorted(f for f in args.photos.rglob("*") if f.is_file())
    print(f"{len(files)} photos, {args.dtype}\n")
    print("| model | PSNR | SSIM | LPIPS-VGG | codes in use | perplexity |\n|---|---|---|---|---|---|")
    for model in args.models:
        which = [] if model == "shipped" else ["--model", model]
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            program("reconstruct", args.photos, "-o", folder / "out", "--dtype", args.dtype, *which)
            scores = []
            for file in files:
                name = file.relative_to(args.photos).as_posix() + ".png"
                painted = np.asarray(Image.open(next((folder / "out").rglob(name))).convert("RGB"))
                photo = original(file)
                signed = [torch.tensor(x / 127.5 - 1).float().permute(2, 0, 1)[None] for x in (painted, photo)]
                with torch.no_grad():
                    scores.append((peak_signal_noise_ratio(photo, painted, data_range=255),
                                   structural_similarity(photo, painted, data_range=255, channel_axis=2, gaussian_weights=True,
                                                         sigma=1.5, use_sample_covariance=False),
                                   distance(*signed).item()))
            usage = ("–", "–")
            if args.train:
                program("tokenize", args.train, "-o", folder / "train", "--dtype", args.dtype, *which)
                said = program("inspect", folder / "train" / "codes")
                said = dict(line.split(maxsplit=1) for line in said.splitlines())
                usage = (f"{100 * float(said['codes_in_use']):.1f} %", f"{float(said['perplexity']):,.0f}")
        psnr, ssim, perceptual = np.mean(scores, axis=0)
        print(f"| {model} | {psnr:.2f} | {ssim:.3f} | {perceptual:.3f} | {usage[0]} | {usage[1]} |", flush=True)


if __name__ == "__main__":
    main()
