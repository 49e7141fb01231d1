"""The model in PyTorch: its two halves, with the tensor names of a model folder."""
import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


class Attention(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)
        self.self_attn = Attention(d, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, mlp), "fc2": nn.Linear(mlp, d)})

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class Half(nn.Module):
    """What both halves share. In `dtype`, but for the search, whose codes and distances are f32."""

    def __init__(self, folder: pathlib.Path):
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        e, d, self.quantizer_config = config["encoder"], config.get("decoder", {}), config["quantizer"]
        width = e["hidden_size"]
        sizes = (width, e["num_attention_heads"], e["intermediate_size"], e["num_hidden_layers"])
        keys = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
        self.encoder_sizes, self.decoder_sizes = sizes, tuple(d.get(k) or s for k, s in zip(keys, sizes))
        self.eps, self.side = e["layer_norm_eps"], e["image_size"] // e["patch_size"]
        self.patch_in, self.patch_out = e["patch_size"], d.get("patch_size") or e["patch_size"]
        self.final_norms = e.get("features") != "before_norm", d.get("final_norm") is not False
        self.cosine = self.quantizer_config.get("metric") == "cosine"

    def load(self, folder: pathlib.Path, dtype: torch.dtype):
        """A tensor at a time, so that neither the file nor its f32 stays in memory."""
        def tensor(name):
            with safe_open(folder / "model.safetensors", "pt") as file:
                return file.get_tensor(name).clone()

        self.load_state_dict({name: tensor(name).to(dtype) for name in self.state_dict()}, assign=True)
        codes = tensor("quantizer.codebook").float() @ tensor("quantizer.transform.weight").float().T
        if self.quantizer_config.get("transform_bias"):
            codes += tensor("quantizer.transform.bias").float()
        codes = F.normalize(codes) if self.cosine else codes
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("half_norms", codes.square().sum(1) * (0 if self.cosine else 0.5), persistent=False)
        return self.requires_grad_(False).eval()

    def blocks(self, sizes):
        d, heads, mlp, depth = sizes
        return nn.ModuleList(Block(d, heads, mlp, self.eps) for _ in range(depth))


class Tokenizer(Half):
    """Pixels [B, 3, H, W] to codes [B, N]."""

    def __init__(self, folder: pathlib.Path, dtype=torch.float32):
        super().__init__(folder)
        d = self.encoder_sizes[0]
        with torch.device("meta"):
            vision = nn.Module()
            vision.embeddings = nn.ModuleDict({
                "patch_embedding": nn.Conv2d(3, d, self.patch_in, self.patch_in),
                "position_embedding": nn.Embedding(self.side**2, d),
            })
            vision.encoder = nn.ModuleDict({"layers": self.blocks(self.encoder_sizes)})
            if self.final_norms[0]:
                vision.post_layernorm = nn.LayerNorm(d, self.eps)
            self.encoder = nn.ModuleDict({"vision_model": vision})
            self.quantizer = nn.ModuleDict({"linear_in": nn.Linear(d, self.quantizer_config["codebook_dim"])})
        self.load(folder, dtype)

    def embed(self, pixels):
        embeddings = self.encoder["vision_model"].embeddings
        x = embeddings["patch_embedding"](pixels.to(embeddings["patch_embedding"].weight.dtype))
        return x.flatten(2).transpose(1, 2) + embeddings["position_embedding"].weight

    def hidden_states(self, pixels):
        """The embeddings and the output of every block."""
        states = [self.embed(pixels)]
        for block in self.encoder["vision_model"].encoder["layers"]:
            states.append(block(states[-1]))
        return states

    def search(self, x):
        h = self.quantizer["linear_in"](x).float()
        h = F.normalize(h, dim=-1) if self.cosine else h
        return (h.flatten(0, 1) @ self.codes.T - self.half_norms).argmax(1).view(h.shape[:2])

    def finish(self, x):
        return self.encoder["vision_model"].post_layernorm(x) if self.final_norms[0] else x

    def forward(self, pixels):
        x = self.embed(pixels)
        for block in self.encoder["vision_model"].encoder["layers"]:
            x = block(x)
        return self.search(self.finish(x))


class Painter(Half):
    """Codes [B, N] to pixels [B, 3, H, W]."""

    def __init__(self, folder: pathlib.Path, dtype=torch.float32):
        super().__init__(folder)
        d = self.decoder_sizes[0]
        with torch.device("meta"):
            decoder = nn.ModuleDict({"layers": self.blocks(self.decoder_sizes)})
            decoder["position_embedding"] = nn.Embedding(self.side**2, d)
            decoder["head"] = nn.Linear(d, 3 * self.patch_out**2)
            if self.final_norms[1]:
                decoder["post_layernorm"] = nn.LayerNorm(d, self.eps)
            self.decoder = decoder
            self.quantizer = nn.ModuleDict({"linear_out": nn.Linear(self.quantizer_config["codebook_dim"], d)})
        self.load(folder, dtype)

    def forward(self, indices):
        out = self.quantizer["linear_out"]
        x = out(self.codes[indices].to(out.weight.dtype)) + self.decoder["position_embedding"].weight
        for block in self.decoder["layers"]:
            x = block(x)
        x = self.decoder["post_layernorm"](x) if self.final_norms[1] else x
        side, p = self.side, self.patch_out
        x = self.decoder["head"](x).view(-1, side, side, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, 3, side * p, side * p).float()


HALVES = {"tokenize": Tokenizer, "reconstruct": Painter}
