"""Choosing key blocks by Triton: queries and keys are pooled in one reading, blocks that a row may see are scored, and
the best of each row are written where the compressed rows want them. How many a row keeps follows from the shapes, so
nothing waits for the device. Pooled queries and keys are rounded to 19 bits (tf32) when they are multiplied."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saccade.core.selection import Blocks
from saccade.ops import device
from saccade.ops.topk.triton import TILE, packed

ROWS = 128  # tokens pooled at once
SCORED = 64  # blocks of queries, and of keys, of a tile of scores


@triton.jit
def _pool(X, OUT, x_b, x_h, x_n, x_d, n, heads, blocks, BLOCK: tl.constexpr, MEAN: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """One block of tokens: the mean or the largest value of every channel."""
    block, job = tl.program_id(0), tl.program_id(1)
    b, head, d = job // heads, job % heads, tl.arange(0, DP)
    X += b.to(tl.int64) * x_b + head.to(tl.int64) * x_h
    end = tl.minimum(n, (block + 1) * BLOCK)
    best = tl.full([DP], 0.0 if MEAN else -float("inf"), tl.float32)
    for t in range(block * BLOCK, end, BR):
        at = t + tl.arange(0, BR)
        there = (at < end)[:, None] & (d < D)[None, :]
        x = tl.load(X + at.to(tl.int64)[:, None] * x_n + d[None, :] * x_d, mask=there, other=0.0).to(tl.float32)
        if MEAN:
            best += tl.sum(x, 0)
        else:
            best = tl.maximum(best, tl.max(tl.where(there, x, -float("inf")), 0))
    if MEAN:
        best = best / (end - block * BLOCK).to(tl.float32)
    tl.store(OUT + (job.to(tl.int64) * blocks + block) * D + d, best, mask=d < D)


@triton.jit
def _score(Q, K, OUT, SEEN, nqb, nkb, GROUP: tl.constexpr, SINK: tl.constexpr, DIAGONAL: tl.constexpr, D: tl.constexpr,
           DP: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """A tile of scores; one that no row may see is left as it is."""
    i, j, d = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, DP)
    seen = tl.load(SEEN + i, mask=i < nqb, other=0)
    if tl.program_id(0) * BM < tl.max(seen, 0):
        head = tl.program_id(2).to(tl.int64)
        in_d = (d < D)[None, :]
        q = tl.load(Q + (head * nqb + i)[:, None] * D + d[None, :], mask=(i < nqb)[:, None] & in_d, other=0.0)
        k = tl.load(K + (head // GROUP * nkb + j)[:, None] * D + d[None, :], mask=(j < nkb)[:, None] & in_d, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="tf32")
        s = tl.where(s == -float("inf"), -3.0e38, s)  # a block that may be seen can be chosen
        if SINK:
            s = tl.where((j == 0)[None, :], float("inf"), s)
        if DIAGONAL:
            s = tl.where(j[None, :] == seen[:, None] - 1, float("inf"), s)
        out = OUT + (head * nqb + i)[:, None] * nkb + j[None, :]
        tl.store(out, s, mask=(i < nqb)[:, None] & (j < nkb)[None, :])


@functools.lru_cache(64)
def kept(queries: int, keys: int, q_block: int, k_block: int, keep: int) -> int:
    """Blocks that all rows together keep: each as many as it may see, `keep` at most."""
    rows = range(1, -(-queries // q_block) + 1)
    seen = ((min(i * q_block, queries) + keys - queries - 1) // k_block + 1 for i in rows)
    return sum(min(keep, max(0, n)) for n in seen)


def reasons(q: Tensor, k: Tensor, k_block: int) -> list[str]:
    """Why these kernels cannot choose here; [] = they can."""
    why = device.triton_reasons(q.detach())
    if q.dtype == torch.float64:
        why.append("it computes in float32, and the inputs are float64")
    if q.shape[-1] > 256:
        why.append(f"heads of {q.shape[-1]}; it takes up to 256")
    if (blocks := -(-k.shape[2] // k_block)) > TILE:
        why.append(f"{blocks} key blocks; it takes up to {TILE}")
    return why + ([] if q.numel() and k.numel() else ["there is nothing to read"])


def pool_and_select(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    *,
    keep_blocks: int,
    q_block: int,
    k_block: int,
    mean: bool,
    force_sink: bool,
    force_diagonal: bool,
) -> Blocks:
    """See the op's api."""
    (b, h, queries, d), (g, keys) = q.shape, k.shape[1:3]
    pooled_q, pooled_k = pool(q, q_block, mean), pool(k, k_block, mean)
    nqb, nkb = pooled_q.shape[2], pooled_k.shape[2]
    end = (torch.arange(1, nqb + 1, device=q.device) * q_block).clamp(max=queries) + keys - queries
    seen = ((end - 1).div(k_block, rounding_mode="floor") + 1).clamp(min=0).int()
    crow = torch.nn.functional.pad(seen.clamp(max=keep_blocks).cumsum(0, dtype=torch.int32), (1, 0))
    scores = torch.empty(b, h, nqb, nkb, dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(nkb, SCORED), triton.cdiv(nqb, SCORED)
    _score[(*tiles, b * h)](
        pooled_q, pooled_k, scores, seen, nqb, nkb, GROUP=h // g, SINK=force_sink, DIAGONAL=force_diagonal, D=d,
        DP=max(16, triton.next_power_of_2(d)), BM=SCORED, num_warps=4,
    )  # fmt: skip
    col = packed(scores, crow, seen, kept(queries, keys, q_block, k_block, keep_blocks))
    shape = {"queries": queries, "keys": keys, "q_block": q_block, "k_block": k_block}
    return Blocks(crow=crow.expand(b, h, -1).contiguous(), col=col, **shape)


def pool(x: Float[Tensor, "b h n d"], block: int, mean: bool, warps: int = 2) -> Float[Tensor, "b h nb d"]:
    """Pool tokens by blocks, in float32; the last block over the tokens it really has. `warps`: for benchmarks."""
    b, h, n, d = x.shape
    blocks = triton.cdiv(n, block)
    out = torch.empty(b, h, blocks, d, dtype=torch.float32, device=x.device)
    _pool[(blocks, b * h)](
        x, out, *x.stride(), n, h, blocks, BLOCK=block, MEAN=mean, D=d, DP=max(16, triton.next_power_of_2(d)),
        BR=min(ROWS, triton.next_power_of_2(block)), num_warps=warps,
    )  # fmt: skip
    return out
