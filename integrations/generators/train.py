"""A small transformer that learns class → codes from what `vqrae-cli tokenize` writes: a loop to begin with.

    python train.py codes -o run --steps 2000
    python train.py codes --dry-run                a batch, in numpy alone

An image is the sequence [class, code, code, …] in raster order; ids of classes follow those of codes. RUN/samples.npy has an image of
each class as the model paints it: `vqrae.Tokenizer().decode(numpy.load("run/samples.npy"))`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq


class Codes:
    """The codes of a folder of shards, as arrays."""

    def __init__(self, folder):
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        if not manifest.get("grid"):
            sys.exit(f"{folder}: every image has its own grid; this loop wants images of one size")
        self.codebook_size, self.grid = manifest["codebook_size"], tuple(manifest["grid"])
        self.length = self.grid[0] * self.grid[1] * manifest["codes_per_token"]
        tables = [pq.read_table(path, columns=["codes", "label", "status"]) for path in sorted(Path(folder).glob("*.parquet"))]
        if not tables:
            sys.exit(f"{folder}: no parquet shards; run vqrae-cli tokenize PHOTOS -o {folder}")
        # Rows of images that could not be read have no codes.
        kept = [table.filter(pc.equal(table["status"], "ok")) for table in tables]
        self.codes = np.concatenate([self.array(table["codes"]) for table in kept])  # uint16 or uint32 [N, T]
        labels = [label for table in kept for label in table["label"].to_pylist()]
        if None in labels:
            sys.exit(f"{folder}: rows without a label; tokenize a folder of folders, one a class, or pass --labels")
        self.labels = np.array(labels, np.int64)  # [N]
        self.classes = int(self.labels.max()) + 1

    def array(self, column):
        """A column of lists, without a Python object a code."""
        lists = [chunk.flatten().to_numpy() for chunk in column.chunks]
        return np.concatenate(lists).reshape(-1, self.length) if lists else np.empty((0, self.length), np.uint16)

    @property
    def vocab_size(self):
        return self.codebook_size + self.classes

    def batch(self, step, size, seed=0):
        """The sequences of a step, int64 [B, 1 + T]: a function of (seed, step) alone."""
        chosen = np.random.default_rng([seed, step]).integers(0, len(self.codes), size)
        classes = self.codebook_size + self.labels[chosen, None]
        return np.concatenate([classes, self.codes[chosen].astype(np.int64)], axis=1)


def build(vocab_size, length, width, depth, heads):
    """Codes and a class in, at each place the logits of the code that comes next."""
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
            block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
            self.head = nn.Linear(width, vocab_size, bias=False)
            nn.init.normal_(self.token.weight, std=0.02)
            nn.init.normal_(self.position.weight, std=0.02)
            self.head.weight = self.token.weight

        def features(self, ids):  # [B, T]
            t = ids.shape[1]
            mask = nn.Transformer.generate_square_subsequent_mask(t, device=ids.device)
            x = self.token(ids) + self.position.weight[:t]
            return self.blocks(x, mask=mask, is_causal=True)  # [B, T, D]

        def forward(self, ids):
            return self.head(self.features(ids))  # [B, T, V]

    return Transformer()


def train(codes, args):
    import torch
    from torch.nn.functional import cross_entropy

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(codes.vocab_size, codes.length, args.width, args.depth, args.heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(codes.codes)} images of {codes.length} codes, {codes.classes} classes, {parameters:,} parameters, {device}")
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100)
        ids = torch.from_numpy(codes.batch(step, args.batch_size, args.seed)).to(device)
        logits = model(ids[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.log_every == 0 or step == args.steps - 1:
            print(f"step {step}  loss {loss.item():.4f}  ({np.log(codes.codebook_size):.4f} knows nothing)")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "args": {name: str(value) for name, value in vars(args).items()}}, args.output / "model.pt")
    samples = sample(model, codes, device)
    np.save(args.output / "samples.npy", samples)
    print(f"{args.output / 'samples.npy'}: an image of each class, {samples.shape}")


def sample(model, codes, device, temperature=1.0):
    """An image of each class, int32 [classes, h, w] (of several codes a token [classes, h, w, c])."""
    import torch

    model.eval()
    ids = codes.codebook_size + torch.arange(codes.classes, device=device)[:, None]
    with torch.no_grad():
        for _ in range(codes.length):
            logits = model.head(model.features(ids)[:, -1])[:, : codes.codebook_size] / temperature  # a class is no code
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    c = codes.length // (codes.grid[0] * codes.grid[1])
    return ids[:, 1:].cpu().numpy().astype(np.int32).reshape(-1, *codes.grid, *([c] if c > 1 else []))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", help="folder that vqrae-cli tokenize wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("run"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="show a batch and stop; needs no PyTorch")
    args = parser.parse_args()
    codes = Codes(args.codes)
    if args.dry_run:
        ids = codes.batch(0, args.batch_size, args.seed)
        print(f"{len(codes.codes)} images, {codes.classes} classes, ids below {codes.vocab_size}; a batch: {ids.dtype} {ids.shape}")
        print(ids)
        return
    train(codes, args)


if __name__ == "__main__":
    main()
