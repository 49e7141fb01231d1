"""`vqrae-cli eval` beside other people's code, with the true weights: scikit-image, pytorch-msssim, lpips, pytorch-fid,
torch-fidelity. Prints each figure, how far apart the two are, and the CPU seconds that a pair of images takes.

    cargo build --release -p vqrae-cli
    python weights/convert_lpips.py WEIGHTS && python weights/convert_inception.py WEIGHTS/inception.safetensors
    python tests/peers/metrics.py --weights WEIGHTS --photos VAL [--count N] [--out FOLDER] [--only rfid …]

Needs torch, torchvision, lpips, scikit-image, pytorch-msssim, pytorch-fid, torch-fidelity, scipy, safetensors, numpy, pillow.
The middle 256x256 of each photo (its short side made 256 where it is not) and what the model that ships makes of it are saved
as PNG, and all programs read these files. Fails where a figure differs by more than a thousandth.
"""
import argparse
import json
import pathlib
import resource
import subprocess
import tempfile
import time

import numpy as np
import skimage.metrics
import torch
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid import inception as of_pytorch_fid
from pytorch_msssim import ms_ssim
from quality import PROGRAM, network, original, program
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from unittest import mock

FILES = {"vgg": "lpips_vgg16.safetensors", "alex": "lpips_alex.safetensors"}
ALLOWED = 1e-3
PYTORCH = "rfid, pytorch-fid's input"


def whole(weights, folder):
    """torch-fidelity's and pytorch-fid's file, but for the classes, which the FID does not look at."""
    state = load_file(weights)
    state |= {k.replace("running_var", "num_batches_tracked"): torch.tensor(0) for k in state if k.endswith("running_var")}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, folder / "inception.pth")
    return folder / "inception.pth"


def planes(files):
    return torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files])


def batches(files, size=8):
    return [planes(files[i:i + size]) for i in range(0, len(files), size)]


def theirs(originals, images, weights, folder, only):
    """Each figure by others, and the CPU seconds it took for each pair."""
    figures, seconds = {}, {}

    def measure(name, of):
        if only and name not in only:
            return
        started = time.process_time()
        with torch.no_grad():
            figures[name] = float(of())
        seconds[name] = (time.process_time() - started) / len(images)

    pairs = list(zip(originals, images))
    arrays = lambda: ((np.array(Image.open(a)), np.array(Image.open(b))) for a, b in pairs)
    measure("psnr", lambda: np.mean([skimage.metrics.peak_signal_noise_ratio(a, b) for a, b in arrays()]))
    ssim = lambda a, b: skimage.metrics.structural_similarity(
        a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    measure("ssim", lambda: np.mean([ssim(a, b) for a, b in arrays()]))
    both = lambda: zip(batches(originals), batches(images))
    measure("ms_ssim", lambda: torch.cat([ms_ssim(a.double(), b.double(), 255, False) for a, b in both()]).mean())
    for net, file in FILES.items():
        of = lambda model: torch.cat([model(a / 127.5 - 1, b / 127.5 - 1).flatten() for a, b in both()]).mean()
        measure(f"lpips_{net}", lambda: of(network(weights / file, net)))

    pth = whole(weights / "inception.safetensors", folder)
    extractor = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=pth)
    statistics = lambda files: fid_features_to_statistics(torch.cat([extractor(x)[0] for x in batches(files)]))
    fidelity = lambda: fid_statistics_to_metric(statistics(originals), statistics(images), False)
    measure("rfid", lambda: fidelity()["frechet_inception_distance"])

    state = torch.load(pth)
    with mock.patch.object(of_pytorch_fid, "load_state_dict_from_url", lambda *_, **__: state):
        network = of_pytorch_fid.InceptionV3([3]).eval()
    features = lambda files: np.concatenate([network(x.float() / 255)[0].flatten(1).numpy() for x in batches(files)])
    moments = lambda x: (x.mean(0), np.cov(x, rowvar=False))
    distance = lambda: fid_score.calculate_frechet_distance(*moments(features(originals)), *moments(features(images)))
    measure(PYTORCH, distance)
    return figures, seconds


def ours(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = json.loads(program("eval", *words))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return line, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / line["images"], after.ru_maxrss >> 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--photos", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", help="of psnr, ssim, ms_ssim, lpips_vgg, lpips_alex, rfid and the other input's")
    a = parser.parse_args()
    folder = a.out or pathlib.Path(tempfile.mkdtemp())
    (folder / "originals").mkdir(parents=True, exist_ok=True)
    for file in sorted(f for f in a.photos.rglob("*") if f.suffix in {".jpg", ".jpeg", ".png"})[:a.count]:
        Image.fromarray(original(file)).save(folder / "originals" / f"{file.stem}.png")
    subprocess.run([PROGRAM, "reconstruct", folder / "originals", "-o", folder, "--dtype", "f32"], check=True, capture_output=True)
    originals = sorted((folder / "originals").glob("*.png"))
    images = [folder / "reconstructions" / f"{f.name}.png" for f in originals]

    network = a.weights / "inception.safetensors"
    base = ["--reference", folder / "originals", "--images", folder / "reconstructions", "-o", folder / "figures"]
    line, plain, memory = ours(base)
    seconds = {}
    runs = {f"lpips_{net}": [f"--lpips-{net}", a.weights / file] for net, file in FILES.items()}
    runs |= {"rfid": ["--inception", network], PYTORCH: ["--inception", network, "--fid-input", "pytorch"]}
    for name, words in runs.items():
        if a.only and name not in a.only:
            continue
        figures, spent, peak = ours([*base, *words])
        line[name], seconds[name], memory = figures[name.split(",")[0]], spent - plain, max(memory, peak)

    figures, theirs_seconds = theirs(originals, images, a.weights, folder, a.only)
    print(f"{len(images)} pairs; PSNR, SSIM, MS-SSIM and reading take us {plain:.4f} CPU s a pair; peak {memory} MiB\n")
    print("| | ours | theirs | apart, relative | ours, CPU s a pair | theirs |\n|---|---|---|---|---|---|")
    worst = 0.0
    for name, expected in figures.items():
        apart = abs(line[name] - expected) / abs(expected)
        worst = max(worst, apart)
        time_of_ours = f"{seconds[name]:.3f}" if name in seconds else "–"
        print(f"| {name} | {line[name]:.6f} | {expected:.6f} | {apart:.1e} | {time_of_ours} | {theirs_seconds[name]:.3f} |")
    assert worst < ALLOWED, f"a figure is {worst:.1e} off"


if __name__ == "__main__":
    main()
