"""Drawing codes with generators of our shape, beside the same networks in PyTorch on the same machine, in turns in one run.

    cargo bench --workspace --bench sampling --no-run
    python tests/peers/generate.py [--rounds N]

Needs torch and numpy. Sizes are those of `Config::small`: 5 blocks of 192, 16,384 codes, 16x16 of them an image; fresh weights, f32.
Ours is `cargo bench --workspace --bench sampling -- --json`, PyTorch keeps keys and values in tensors of the whole length, and draws by
softmax and multinomial; its masked generator takes MaskGIT's 12 steps. Prints seconds an image, the best of all rounds.
"""
import argparse
import json
import math
import subprocess
import time

import torch
import torch.nn.functional as F

WIDTH, DEPTH, HEADS, MLP, CODES, FEATURES, TOKENS, STEPS = 192, 5, 6, 768, 16384, 96, 256, 12


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH, MLP), torch.nn.Linear(MLP, WIDTH)

    def forward(self, x, cache=None, place=0):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0][:, :, place:place + n], cache[1][:, :, place:place + n] = k, v
            k, v = cache[0][:, :, :place + n], cache[1][:, :, :place + n]
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, WIDTH)
        x = x + self.out(seen)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Generator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.positions = torch.nn.Embedding(CODES + 1, WIDTH), torch.nn.Parameter(torch.zeros(TOKENS, WIDTH))
        self.blocks = torch.nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, FEATURES)
        self.codes = torch.nn.Linear(FEATURES, CODES)

    def scores(self, x):
        return self.codes(self.head(self.norm(x)))


@torch.inference_mode()
def by_rows(model, images):
    head = WIDTH // HEADS
    caches = [[torch.zeros(images, HEADS, TOKENS, head) for _ in range(2)] for _ in range(DEPTH)]
    code, codes = torch.full((images,), CODES), []
    for place in range(TOKENS):
        x = (model.table(code) + model.positions[place])[:, None]
        for block, cache in zip(model.blocks, caches):
            x = block(x, cache, place)
        code = torch.multinomial(model.scores(x[:, 0]).softmax(-1), 1)[:, 0]
        codes.append(code)
    return torch.stack(codes, 1)


@torch.inference_mode()
def masked(model, images):
    codes = torch.full((images, TOKENS), CODES)
    for step in range(STEPS):
        x = model.table(codes) + model.positions
        for block in model.blocks:
            x = block(x)
        unknown = codes == CODES
        chances = model.scores(x[unknown]).softmax(-1)
        drawn = torch.multinomial(chances, 1)
        noise = -torch.log(-torch.log(torch.rand(len(drawn))))
        sure = torch.full((images, TOKENS), -math.inf)
        sure[unknown] = chances.gather(1, drawn)[:, 0].log() + 6 * (1 - (step + 1) / STEPS) * noise
        left = int(math.cos(math.pi / 2 * (step + 1) / STEPS) * TOKENS) if step + 1 < STEPS else 0
        full = codes.clone()
        full[unknown] = drawn[:, 0]
        stay = sure.argsort(-1, descending=True)[:, :int(unknown.sum(1)[0]) - left]
        codes.scatter_(1, stay, full.gather(1, stay))
    return codes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    model, best = Generator().eval(), {}

    def note(what, images, seconds):
        best[what, images] = min(best.get((what, images), math.inf), seconds / images)

    for _ in range(rounds):
        bench = ["cargo", "bench", "-q", "--workspace", "--bench", "sampling", "--", "--json", "--rounds", "1"]
        for line in subprocess.run(bench, check=True, capture_output=True, text=True).stdout.splitlines():
            figures = json.loads(line)
            for way in ("cached", "masked"):
                note(f"ours {figures['dtype']} {way}", figures["images"], figures[way] * figures["images"])
        for images in (1, 8):
            for way, draw in (("cached", by_rows), ("masked", masked)):
                begin = time.perf_counter()
                assert draw(model, images).max() < CODES
                note(f"PyTorch f32 {way}", images, time.perf_counter() - begin)
    print("| images at a time | way | PyTorch f32, s an image | ours f32 | PyTorch / ours | ours bf16 |\n|---|---|---|---|---|---|")
    for images in (1, 8):
        for way in ("cached", "masked"):
            peer, ours, narrow = (best[f"{who} {way}", images] for who in ("PyTorch f32", "ours f32", "ours bf16"))
            print(f"| {images} | {way} | {peer:.4f} | {ours:.4f} | {peer / ours:.2f} | {narrow:.4f} |")


main()
