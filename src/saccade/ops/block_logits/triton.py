"""Block logits by Triton: the queries of a group stay in registers, keys are read where they are listed, and nothing
but the maxima is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saccade.ops import device

MOST_ROWS = 64  # queries of a group


@triton.jit
def _larger(a, b):
    """A NaN stays one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# fmt: off
@triton.jit
def _logits(Q, K, FIRST, BLOCKS, OUT, q_b, q_h, q_n, q_r, q_d, k_b, k_h, k_t, k_d, i_b, i_h, i_n, i_l, first_n, keys,
            groups, heads, blocks, GROUP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr,
            DP: tl.constexpr, WIDTH: tl.constexpr, BL: tl.constexpr):
# fmt: on
    """One group of queries over a tile of its blocks, token by token."""
    job = tl.program_id(0)
    b, head, group = job // (groups * heads), job // groups % heads, job % groups
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    i = tl.program_id(1) * BL + tl.arange(0, BL)
    ok, in_d = i < blocks, (d < D)[None, :]
    Q += b.to(tl.int64) * q_b + head.to(tl.int64) * q_h + group.to(tl.int64) * q_n
    K += b.to(tl.int64) * k_b + (head // GROUP).to(tl.int64) * k_h
    BLOCKS += b.to(tl.int64) * i_b + head.to(tl.int64) * i_h + group.to(tl.int64) * i_n
    q = tl.load(Q + r[:, None] * q_r + d[None, :] * q_d, mask=(r < R)[:, None] & in_d, other=0.0)
    token = tl.load(FIRST + group * first_n) + tl.load(BLOCKS + i * i_l, mask=ok, other=0) * WIDTH
    best = tl.full([BL], -float("inf"), tl.float32)
    for w in range(WIDTH):
        at = tl.minimum(token + w, keys - 1).to(tl.int64)
        k = tl.load(K + at[:, None] * k_t + d[None, :] * k_d, mask=ok[:, None] & in_d, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where((r < R)[:, None], s, -float("inf"))
        best = _larger(best, tl.reduce(s, 0, _larger))
    tl.store(OUT + job.to(tl.int64) * blocks + i, best, mask=ok)


def reasons(q: Float[Tensor, "b h n r d"], k: Float[Tensor, "b g k d"], blocks: Int[Tensor, "b h n l"]) -> list[str]:
    """Why these kernels cannot compute it; [] = they can."""
    why = device.triton_reasons(q, k)
    if q.dtype == torch.float64:
        why.append("it computes in float32 at most, and the inputs are float64")
    if q.shape[-1] > 256:
        why.append(f"heads of {q.shape[-1]}; it takes up to 256")
    if q.shape[3] > MOST_ROWS:
        why.append(f"groups of {q.shape[3]} queries; it takes up to {MOST_ROWS}")
    return why if q.numel() and k.numel() and blocks.numel() else [*why, "there is nothing to read"]


def block_logits(
    q: Float[Tensor, "b h n r d"],
    k: Float[Tensor, "b g k d"],
    first: Int[Tensor, " n"],
    width: int,
    blocks: Int[Tensor, "b h n l"],
) -> Float[Tensor, "b h n l"]:
    """See the op's api."""
    b, h, n, l = blocks.shape
    rows, size = q.shape[3:]
    out = torch.empty(b, h, n, l, dtype=torch.float32, device=q.device)
    tile = 64 if size <= 128 else 32
    _logits[(b * h * n, triton.cdiv(l, tile))](
        q, k, first, blocks, out, *q.stride(), *k.stride(), *blocks.stride(), first.stride(0), k.shape[2], n, h, l,
        GROUP=h // k.shape[1], R=rows, RP=max(16, triton.next_power_of_2(rows)), D=size,
        DP=max(16, triton.next_power_of_2(size)), WIDTH=width, BL=tile, num_warps=4,
    )  # fmt: skip
    return out
