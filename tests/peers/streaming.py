"""Nearest code by cosine in Triton, without the matrix of scores: products in fp16, a running maximum in f32, the lowest code on ties.

Few tokens are shared out by their codes: every part of the codes has its own best, and a second kernel takes the first of these.
TRITON_INTERPRET=1 runs it on the CPU.
"""
import torch
import triton
import triton.language as tl


@triton.jit
def best_of_part(z, c, scores_out, codes_out, n, k, d, per_part, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    begin = part * per_part
    end = tl.minimum(begin + per_part, k)
    best = tl.full((BN,), float("-inf"), tl.float32)
    code = tl.zeros((BN,), tl.int32)
    for start in range(begin, end, BK):
        columns = start + tl.arange(0, BK)
        scores = tl.zeros((BN, BK), tl.float32)
        for at in range(0, d, BD):
            dims = at + tl.arange(0, BD)
            a = tl.load(z + rows[:, None] * d + dims[None, :], mask=(rows[:, None] < n) & (dims[None, :] < d), other=0.0)
            b = tl.load(c + columns[None, :] * d + dims[:, None], mask=(columns[None, :] < end) & (dims[:, None] < d), other=0.0)
            scores = tl.dot(a, b, scores)
        # Not zero: where all scores are below it, a code that does not exist would win.
        scores = tl.where(columns[None, :] < end, scores, float("-inf"))
        top, place = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        better = top > best
        best = tl.where(better, top, best)
        code = tl.where(better, start + place, code)
    tl.store(scores_out + part * n + rows, best, mask=rows < n)
    tl.store(codes_out + part * n + rows, code, mask=rows < n)


@triton.jit
def best_of_all(scores, codes, out, n, parts, BN: tl.constexpr):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    best = tl.full((BN,), float("-inf"), tl.float32)
    code = tl.zeros((BN,), tl.int32)
    for part in range(0, parts):
        score = tl.load(scores + part * n + rows, mask=rows < n, other=float("-inf"))
        its = tl.load(codes + part * n + rows, mask=rows < n, other=0)
        code = tl.where(score > best, its, code)
        best = tl.where(score > best, score, best)
    tl.store(out + rows, code, mask=rows < n)


def nearest(z: torch.Tensor, c: torch.Tensor, processors: int = 132) -> torch.Tensor:
    """Tokens fp16 [N, D] and codes fp16 [K, D] to int32 [N]."""
    (n, d), k = z.shape, len(c)
    bn, bk, bd = (128, 128, 64) if n > 64 else (64, 128, 64)
    blocks = triton.cdiv(n, bn)
    parts = min(max(triton.cdiv(2 * processors, blocks), 1), triton.cdiv(k, bk))
    per_part = triton.cdiv(triton.cdiv(k, parts), bk) * bk
    parts = triton.cdiv(k, per_part)
    scores = torch.empty((parts, n), dtype=torch.float32, device=z.device)
    codes = torch.empty((parts, n), dtype=torch.int32, device=z.device)
    out = torch.empty(n, dtype=torch.int32, device=z.device)
    best_of_part[(blocks, parts)](z, c, scores, codes, n, k, d, per_part, BN=bn, BK=bk, BD=bd, num_warps=8, num_stages=3)
    best_of_all[(triton.cdiv(n, 256),)](scores, codes, out, n, parts, BN=256)
    return out
