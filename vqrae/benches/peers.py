"""The same model in PyTorch on the same machine, in turns with ours: images a second, and whether the codes agree.

    cargo bench -p vqrae --bench throughput --no-run
    python vqrae/benches/peers.py [--shapes shipped siglip-l] [--batch 4] [--rounds 3]

Needs torch, safetensors, numpy. Prints a Markdown table: PyTorch in f32 and bf16 (autocast off, weights cast, nearest
code in f32), ours in f32, and the ratio ours / PyTorch.
"""
import argparse, json, pathlib, resource, subprocess, sys, tempfile, time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Vqrae:
    """encode and decode of a model folder, tensor names as they are."""

    def __init__(self, folder, dtype):
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        keep = lambda n: torch.float32 if n.startswith("quantizer.") else dtype
        self.w = {n: t.to(keep(n)) for n, t in weights.items()}
        self.dtype = dtype
        self.codes = self.w["quantizer.codebook"] @ self.w["quantizer.transform.weight"].T
        self.half_norms = self.codes.square().sum(1) / 2

    def linear(self, x, name):
        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def norm(self, x, name, eps):
        if name + ".weight" not in self.w:
            return x
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"], eps)

    def blocks(self, x, prefix, heads, eps):
        i = 0
        while f"{prefix}.layers.{i}.layer_norm1.weight" in self.w:
            p = f"{prefix}.layers.{i}"
            y = self.norm(x, p + ".layer_norm1", eps)
            q, k, v = (self.linear(y, f"{p}.self_attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.linear(y, p + ".self_attn.out_proj")
            y = self.norm(x, p + ".layer_norm2", eps)
            x = x + self.linear(F.gelu(self.linear(y, p + ".mlp.fc1"), approximate="tanh"), p + ".mlp.fc2")
            i += 1
        return x

    def encode(self, pixels):
        c = self.config["encoder"]
        e = "encoder.vision_model."
        w, b = self.w[e + "embeddings.patch_embedding.weight"], self.w[e + "embeddings.patch_embedding.bias"]
        x = F.conv2d(pixels.to(self.dtype), w, b, stride=c["patch_size"]).flatten(2).transpose(1, 2)
        x = x + self.w[e + "embeddings.position_embedding.weight"]
        x = self.blocks(x, e + "encoder", c["num_attention_heads"], c["layer_norm_eps"])
        x = self.norm(x, e + "post_layernorm", c["layer_norm_eps"])
        h = self.linear(x.float(), "quantizer.linear_in")
        return (h.flatten(0, 1) @ self.codes.T - self.half_norms).argmax(1).view(h.shape[:2])

    def decode(self, indices):
        c, d = self.config["encoder"], self.config["decoder"]
        x = self.linear(self.codes[indices], "quantizer.linear_out").to(self.dtype)
        x = x + self.w["decoder.position_embedding.weight"]
        x = self.blocks(x, "decoder", d.get("num_attention_heads") or c["num_attention_heads"], c["layer_norm_eps"])
        x = self.linear(self.norm(x, "decoder.post_layernorm", c["layer_norm_eps"]), "decoder.head")
        side, p = int(x.shape[1] ** 0.5), d.get("patch_size") or c["patch_size"]
        x = x.view(-1, side, side, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, 3, side * p, side * p).float()


def best(rounds, run):
    run()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def peer(folder, dtype, batch, rounds):
    with torch.inference_mode():
        model = Vqrae(folder, dtype)
        pixels = torch.rand(batch, 3, 256, 256) * 2 - 1
        codes = model.encode(pixels)
        encode = best(rounds, lambda: model.encode(pixels))
        decode = best(rounds, lambda: model.decode(codes))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"tokenize": batch / encode, "reconstruct": batch / decode, "peak_mib": peak}


def ours(shape, batch, rounds, export=None):
    command = ["cargo", "bench", "-q", "-p", "vqrae", "--bench", "throughput", "--", "--shape", shape]
    command += ["--batch", str(batch), "--rounds", str(rounds)] + (["--export", str(export)] if export else [])
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def in_own_process(folder, dtype, batch, rounds):
    """So that the peak memory is that of this model alone."""
    command = [sys.executable, __file__, "--peer", str(folder), "--dtype", dtype, "--batch", str(batch), "--rounds", str(rounds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["shipped", "siglip-l"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32")
    a = parser.parse_args()
    if a.peer:
        return print(json.dumps(peer(a.peer, getattr(torch, a.dtype), a.batch, a.rounds)))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {a.batch}, best of {a.rounds}\n")
    print("| model | what | ours f32 | PyTorch f32 | PyTorch bf16 | ours / PyTorch f32 | ours / bf16 |")
    print("|---|---|---|---|---|---|---|")
    for shape in a.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = ROOT / "weights" / "vqrae-small" if shape == "shipped" else pathlib.Path(temporary)
            us = ours(shape, a.batch, a.rounds, None if shape == "shipped" else folder)
            f32 = in_own_process(folder, "float32", a.batch, a.rounds)
            bf16 = in_own_process(folder, "bfloat16", a.batch, a.rounds)
        for what, unit in (("tokenize", "images/s"), ("reconstruct", "images/s"), ("peak_mib", "MiB")):
            x, y, z = us[what], f32[what], bf16[what]
            name = {"peak_mib": "peak memory"}.get(what, what)
            print(f"| {shape} | {name}, {unit} | {x:.4g} | {y:.4g} | {z:.4g} | {x / y:.2f} | {x / z:.2f} |", flush=True)


if __name__ == "__main__":
    main()
