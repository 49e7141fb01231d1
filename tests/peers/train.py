"""A training step beside PyTorch's: the same model, batch, losses and optimizer in f32, in turns on one machine.

    cargo build --release -p vqrae-cli
    python tests/peers/train.py [--stages 1,2] [--batch 8] [--steps 4] [--rounds 2] [--small]

Needs torch, transformers, safetensors, numpy, pillow. A ViT-B/16 encoder of SigLIP's shape with random weights on 256 pixels, SimVQ of
16,384 codes 768 wide, a ViT-B decoder; stage 1 keeps the encoder out of the graph, stage 2 trains it. Loss: squared error of the pixels
and SimVQ's; AdamW with the gradient clipped. Ours is the program as people run it, photos and all; PyTorch is given its pixels. Shown
is the best round of each, in seconds a step (the first two of a run are not counted), and the peak memory of a process that only
trains. Prints Markdown.
"""
import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROGRAM = ROOT / "target/release/vqrae-cli"
WARM = 2
RATES = {"encoder": 1e-5, "quantizer": 1e-4, "decoder": 1e-4}


def model(folder: pathlib.Path, small: bool):
    """A model folder of a random encoder."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
    sizes = dict(hidden_size=192, intermediate_size=768, num_hidden_layers=3, num_attention_heads=3) if small else {}
    encoder = SiglipVisionModel(SiglipVisionConfig(image_size=256, patch_size=16, vision_use_head=False, **sizes))
    encoder.save_pretrained(folder / "encoder")
    SiglipImageProcessor(size={"height": 256, "width": 256}).save_pretrained(folder / "encoder")
    quantizer = {"type": "simvq", "codebook_size": 16384, "codebook_dim": sizes.get("hidden_size", 768)}
    (folder / "wishes.json").write_text(json.dumps({"quantizer": quantizer}))
    words = ["init", "--encoder", folder / "encoder", "--config", folder / "wishes.json", "-o", folder / "model"]
    subprocess.run([PROGRAM, *words], check=True, stdout=subprocess.DEVNULL)


def photos(folder: pathlib.Path):
    from PIL import Image
    (folder / "photos").mkdir()
    random = np.random.default_rng(3)
    for i in range(16):
        noise = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((400, 300))
        noise.save(folder / "photos" / f"{i}.jpg")


def ours(folder: pathlib.Path, stage: int, batch: int, steps: int) -> list:
    out = folder / f"run-{stage}-{time.time_ns()}"
    rate = {name: peak * (stage == 2 or name != "encoder") for name, peak in RATES.items()}
    groups = "\n".join(f"{name} = {{ peak = {peak}, end = {peak} }}" for name, peak in rate.items())
    (folder / "train.toml").write_text(f"""
[start]
from = "folder"
path = "{folder / 'model'}"
[train]
steps = {steps + WARM}
batch_size = {batch}
warmup_steps = 1
log_every = 1
validate_every = 0
checkpoint_every = 0
[groups]
{groups}
""")
    words = ["train", "--config", folder / "train.toml", "--data", folder / "photos", "--output-dir", out, "--device", "cpu"]
    subprocess.run([PROGRAM, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["images_per_step"] / line["images_per_second"] for line in lines if "images_per_second" in line][WARM:]


def pytorch(folder: pathlib.Path, stage: int, batch: int, steps: int) -> list:
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from model import Painter, Tokenizer
    encoder, decoder = Tokenizer(folder / "model"), Painter(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    codebook, transform = weights["quantizer.codebook"], weights["quantizer.transform.weight"].requires_grad_()
    del weights
    for part in (encoder.quantizer, decoder):
        part.requires_grad_()
    encoder.encoder.requires_grad_(stage == 2)
    quantizer = [transform, *encoder.quantizer.parameters(), *decoder.quantizer.parameters()]
    groups = [(quantizer, "quantizer"), (list(decoder.decoder.parameters()), "decoder")]
    if stage == 2:
        groups.append((list(encoder.encoder.parameters()), "encoder"))
    optimizer = torch.optim.AdamW([{"params": p, "lr": RATES[name]} for p, name in groups], weight_decay=1e-4)
    everything = [p for params, _ in groups for p in params]
    seconds = []
    for step in range(steps + WARM):
        pixels = torch.randn(batch, 3, 256, 256)
        start = time.perf_counter()
        with torch.set_grad_enabled(stage == 2):
            features = encoder.finish(encoder.hidden_states(pixels)[-1])
        h = encoder.quantizer["linear_in"](features)
        codes = codebook @ transform.T
        with torch.no_grad():
            indices = (h.flatten(0, 1) @ codes.T - codes.square().sum(1) / 2).argmax(1)
        q = codes[indices].view_as(h)
        loss = F.mse_loss(q, h.detach()) + 0.25 * F.mse_loss(h, q.detach())
        x = decoder.quantizer["linear_out"](h + (q - h).detach()) + decoder.decoder["position_embedding"].weight
        for block in decoder.decoder["layers"]:
            x = block(x)
        x = decoder.decoder["head"](decoder.decoder["post_layernorm"](x))
        side, p = decoder.side, decoder.patch_out
        painted = x.view(-1, side, side, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(pixels.shape)
        (F.mse_loss(painted, pixels) + loss).backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM:]


def measured(who: str, *words) -> dict:
    """In a process of its own, for its peak memory."""
    out = subprocess.run([sys.executable, __file__, "--worker", who, *map(str, words)], cwd=HERE, check=True,
                         capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def worker(who: str, folder: str, stage: str, batch: str, steps: str):
    run = {"ours": ours, "PyTorch": pytorch}[who]
    seconds = run(pathlib.Path(folder), int(stage), int(batch), int(steps))
    whose = resource.RUSAGE_CHILDREN if who == "ours" else resource.RUSAGE_SELF
    print(json.dumps({"seconds": float(np.median(seconds)), "peak": resource.getrusage(whose).ru_maxrss / 1024}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, batch {args.batch}, 256 pixels, f32\n")
    print("| stage | ours, s a step | PyTorch | ours ÷ PyTorch | ours, peak MiB | PyTorch |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model(folder, args.small)
        photos(folder)
        for stage in map(int, args.stages.split(",")):
            runs = {"ours": [], "PyTorch": []}
            for who in list(runs) * args.rounds:
                runs[who].append(measured(who, folder, stage, args.batch, args.steps))
            s = {who: min(run["seconds"] for run in found) for who, found in runs.items()}
            peak = {who: max(run["peak"] for run in found) for who, found in runs.items()}
            print(f"| {stage} | {s['ours']:.2f} | {s['PyTorch']:.2f} | {s['ours'] / s['PyTorch']:.2f} "
                  f"| {peak['ours']:,.0f} | {peak['PyTorch']:,.0f} |", flush=True)


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
