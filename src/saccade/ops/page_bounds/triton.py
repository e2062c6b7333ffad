"""Bounds of pages by Triton. Since sum_d max(q_d low_d, q_d high_d) = max(q, 0).high + min(q, 0).low, the scores of all
query heads of a key/value head are two small products, and reading the bounds is all that takes time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from saccade.ops import device


@triton.jit(do_not_specialize=["keys", "pages"])
def _bounds(K, LOW, HIGH, k_b, k_h, k_t, k_d, keys, pages, heads, PAGE: tl.constexpr, D: tl.constexpr,
            DP: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """The pages of one tile, token by token."""
    b, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    page, d = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, DP)
    there = (page < pages)[:, None] & (d < D)[None, :]
    K += b.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    first = page.to(tl.int64) * PAGE
    x = tl.load(K + first[:, None] * k_t + d[None, :] * k_d, mask=there, other=0.0).to(tl.float32)
    low, high = x, x
    for i in range(1, PAGE):
        at = tl.minimum(first + i, keys - 1)
        x = tl.load(K + at[:, None] * k_t + d[None, :] * k_d, mask=there, other=0.0).to(tl.float32)
        low = tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)
    to = (tl.program_id(1).to(tl.int64) * pages + page)[:, None] * D + d[None, :]
    tl.store(LOW + to, low, mask=there)
    tl.store(HIGH + to, high, mask=there)


# fmt: off
@triton.jit(do_not_specialize=["pages"])
def _scores(Q, LOW, HIGH, OUT, q_b, q_h, q_q, q_d, l_b, l_h, l_p, l_d, u_b, u_h, u_p, u_d, pages, groups, queries,
            GROUP: tl.constexpr, GP: tl.constexpr, BY_GROUP: tl.constexpr, SAME: tl.constexpr, D: tl.constexpr,
            DP: tl.constexpr, STEP: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr):
# fmt: on
    """The query heads of one key/value head and one query, over a tile of pages. SAME: both bounds are one key."""
    if PDL:
        gdc_launch_dependents()
    job = tl.program_id(1)
    b, kv, query = job // (groups * queries), job // queries % groups, job % queries
    i, page = tl.arange(0, GP), tl.program_id(0) * BP + tl.arange(0, BP)
    live, head = i < GROUP, kv * GROUP + i
    LOW += b.to(tl.int64) * l_b + kv.to(tl.int64) * l_h + page.to(tl.int64)[:, None] * l_p
    HIGH += b.to(tl.int64) * u_b + kv.to(tl.int64) * u_h + page.to(tl.int64)[:, None] * u_p
    Q += b.to(tl.int64) * q_b + query * q_q + (head * q_h)[:, None]
    s = tl.zeros([GP, BP], tl.float32)
    for first in tl.static_range(0, DP, STEP):  # several short sums round less than a long one
        d = first + tl.arange(0, STEP)
        in_d = (d < D)[None, :]
        there = (page < pages)[:, None] & in_d
        low = tl.load(LOW + d[None, :] * l_d, mask=there, other=0.0)
        q = tl.load(Q + d[None, :] * q_d, mask=live[:, None] & in_d, other=0.0)
        if SAME:
            s += tl.dot(q, tl.trans(low), input_precision="ieee")
        else:
            high = tl.load(HIGH + d[None, :] * u_d, mask=there, other=0.0)
            none, sign = tl.zeros_like(q), q.to(tl.float32)  # Triton 3.9's interpreter compares the bits of bfloat16
            some = tl.dot(tl.where(sign < 0, none, q), tl.trans(high), input_precision="ieee")  # a NaN stays one
            s += some + tl.dot(tl.where(sign > 0, none, q), tl.trans(low), input_precision="ieee")
    if BY_GROUP:
        best = tl.max(tl.where(live[:, None], s, -float("inf")), 0)
        tl.store(OUT + ((b * groups + kv) * queries + query).to(tl.int64) * pages + page, best, mask=page < pages)
    else:
        row = ((b * groups * GROUP + head) * queries + query).to(tl.int64)
        tl.store(OUT + row[:, None] * pages + page[None, :], s, mask=live[:, None] & (page < pages)[None, :])


def page_bounds(
    k: Float[Tensor, "b g k d"], page_tokens: int
) -> tuple[Float[Tensor, "b g p d"], Float[Tensor, "b g p d"]]:
    """See the op's api."""
    b, g, keys, d = k.shape
    pages, block = triton.cdiv(keys, page_tokens), 16
    low, high = (torch.empty(b, g, pages, d, dtype=k.dtype, device=k.device) for _ in range(2))
    _bounds[(triton.cdiv(pages, block), b * g)](
        k, low, high, *k.stride(), keys, pages, g, PAGE=page_tokens, D=d, DP=max(16, triton.next_power_of_2(d)),
        BP=block, num_warps=4,
    )  # fmt: skip
    return low, high


def page_scores(
    q: Float[Tensor, "b h q d"],
    low: Float[Tensor, "b g p d"],
    high: Float[Tensor, "b g p d"],
    by_group: bool,
    block: int = 0,
    warps: int = 2,
) -> Float[Tensor, "b h|g q p"]:
    """See the op's api. `block` (pages of a tile) and `warps` are for benchmarks."""
    (b, h, n, d), (g, pages) = q.shape, low.shape[1:3]
    out = torch.empty(b, g if by_group else h, n, pages, dtype=torch.float32, device=q.device)
    wide = max(16, triton.next_power_of_2(d))
    same = low is high
    block = block or max(16, min(256 if same else 64, 16384 // (wide * q.element_size())))
    _scores[(triton.cdiv(pages, block), b * g * n)](
        q, low, high, out, *q.stride(), *low.stride(), *high.stride(), pages, g, n, GROUP=h // g,
        GP=max(16, triton.next_power_of_2(h // g)), BY_GROUP=by_group, SAME=same, D=d, DP=wide,
        STEP=min(wide, 32) if q.dtype == torch.float32 else wide, BP=block, PDL=device.dependent_launch(q.device.index),
        num_warps=warps,
    )  # fmt: skip
    return out
