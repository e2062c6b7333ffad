"""Antidiagonal mass by Triton: one product of the groups of queries with those of keys, and no logit leaves the chip.

A tile of logits is a product over the tokens of a group, S tiles of one token of every group each: token S-1-i of the
queries' groups with token i of the keys', read where they lie. What a tile leaves is each row's largest logit and its
sums of exponentials below that, one for each block of keys: as many times fewer as a block has groups. When some rows
are through, a second kernel puts their tiles on one footing and averages over the rows of a block. Two passes over the
product, as column_scores makes, would store less and take twice as long: here the product is nearly all.

Tiles are 128 rows by 256 keys on Hopper, half a multiprocessor's registers: smaller ones ask more of the second-level
cache than it gives. Neighbours in the grid are some tiles of rows, of all heads that share keys, beside the same keys,
so that those are read from memory once for all of them. Only tiles that some row sees are in the grid, but for a few:
bands of rows near the start and near the end are dealt out in pairs, which see about as many together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saccade.ops import device
from saccade.ops.tanh import tanh

LOG2E = 1.4426950408889634
MOST = 2**26  # sums held at once: 256 MiB
NEIGHBOURS = 16  # tiles of rows beside one another
AT_ONCE = 64  # tiles, and key blocks, that a row is put together from at a time
EACH = 128  # groups of a block, at most: it lies in one tile


@triton.jit
def _ends(rows, queries, keys, STRIDE: tl.constexpr):
    """How many groups of keys these groups of queries see."""
    return (tl.minimum((rows + 1) * STRIDE + keys - queries, keys) + STRIDE - 1) // STRIDE


# fmt: off
@triton.jit(do_not_specialize=["queries", "keys", "first", "bands", "width", "span", "tiles"])
def _sums(Q, K, SUMS, STAT, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, scale, cap, queries, keys, heads, first, bands,
          width, span, tiles, GROUP: tl.constexpr, STRIDE: tl.constexpr, EACH: tl.constexpr, CAPPED: tl.constexpr,
          D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr):
# fmt: on
    """One tile: each row's largest logit in units of log 2, and sums of exponentials, of all its keys and by blocks.

    first: the row that the workspace begins at, `span` rows of every head; `bands` of BAND tiles of rows are computed
    width: tiles of keys that two bands see together
    """
    x, pairs, kv_heads = tl.program_id(0), (bands + 1) // 2, heads // GROUP
    inner, x = x % (GROUP * BAND), x // (GROUP * BAND)
    col, x = x % width, x // width
    pair, job = x % pairs, x // pairs
    b, head, band = job // kv_heads, job % kv_heads * GROUP + inner % GROUP, pair
    groups = (queries + STRIDE - 1) // STRIDE
    near = tl.minimum(first + (pair + 1) * BAND * BM, groups) - 1
    near = (_ends(near, queries, keys, STRIDE) + BN - 1) // BN
    if col >= near:
        col -= near
        band = bands - 1 - pair
        if band == pair:  # the one in the middle has no partner
            return
    row = first + (band * BAND + inner // GROUP) * BM
    if row >= groups:
        return
    last = tl.minimum(row + BM, groups) - 1
    if col * BN >= _ends(last, queries, keys, STRIDE):
        return
    r, u, c = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    Q += b.to(tl.int64) * q_b + head.to(tl.int64) * q_h + row.to(tl.int64) * STRIDE * q_t
    K += b.to(tl.int64) * k_b + (head // GROUP).to(tl.int64) * k_h + col.to(tl.int64) * BN * STRIDE * k_t
    q_at = Q + (r.to(tl.int64) * STRIDE * q_t)[:, None] + (c * q_d)[None, :]
    k_at = K + (u.to(tl.int64) * STRIDE * k_t)[:, None] + (c * k_d)[None, :]
    q_left, k_left = queries - (row + r) * STRIDE, keys - (col * BN + u) * STRIDE  # tokens from each group's first on
    PARTS: tl.constexpr = (D + BK - 1) // BK
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(STRIDE * PARTS):
        i, d = step // PARTS, step % PARTS * BK
        back = STRIDE - 1 - i
        in_q, in_k = (back < q_left)[:, None], (i < k_left)[:, None]
        if D % BK:
            in_q, in_k = in_q & (d + c < D)[None, :], in_k & (d + c < D)[None, :]
        q = tl.load(q_at + (back * q_t + d * q_d), mask=in_q, other=0.0)
        k = tl.load(k_at + (i * k_t + d * k_d), mask=in_k, other=0.0)
        acc = tl.dot(q, tl.trans(k), acc)
    s = acc * scale
    if CAPPED:
        s = cap * tanh(s, False)
    if col * BN + BN > _ends(row, queries, keys, STRIDE):
        seen = _ends(row + r, queries, keys, STRIDE)
        s = tl.where((col * BN + u)[None, :] < seen[:, None], s, -float("inf"))
    m = tl.max(s, 1)
    p = tl.math.exp2(s - tl.where(m == -float("inf"), 0.0, m)[:, None])
    UNITS: tl.constexpr = BN // EACH
    part = tl.sum(tl.reshape(p, [BM, UNITS, EACH]), 2)
    place = (b * heads + head).to(tl.int64) * span + row - first + r
    at = (place * tiles + col) * UNITS
    tl.store(SUMS + at[:, None] + tl.arange(0, UNITS)[None, :], part)
    stat = STAT + (place * tiles + col) * 2
    tl.store(stat, m)
    tl.store(stat + 1, tl.sum(part, 1))


# fmt: off
@triton.jit(do_not_specialize=["queries", "keys", "first", "span", "tiles", "nqb", "nkb"])
def _average(SUMS, STAT, OUT, queries, keys, first, span, tiles, nqb, nkb, STRIDE: tl.constexpr, EACH: tl.constexpr,
             BN: tl.constexpr, AT: tl.constexpr):
# fmt: on
    """The shares of a block of queries in each block of keys, from what `_sums` left of its rows."""
    block, head = first // EACH + tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, n = block * EACH + tl.arange(0, EACH), tl.arange(0, AT)
    groups = (queries + STRIDE - 1) // STRIDE
    live = row < groups
    seen = tl.where(live, _ends(row, queries, keys, STRIDE), 0)
    place = (head * span + row - first) * tiles
    top, total = tl.full([EACH], -3.0e38, tl.float32), tl.zeros([EACH], tl.float32)
    for t in range(0, (tl.max(seen, 0) + BN - 1) // BN, AT):
        there = ((t + n) * BN)[None, :] < seen[:, None]
        at = STAT + (place[:, None] + t + n[None, :]) * 2
        m = tl.load(at, mask=there, other=-float("inf"))
        more = tl.load(at + 1, mask=there, other=0.0)
        new = tl.maximum(top, tl.max(m, 1))
        total = total * tl.math.exp2(top - new) + tl.sum(more * tl.math.exp2(m - new[:, None]), 1)
        top = new
    share = 1.0 / tl.where(live, total, 1.0) / tl.minimum(groups - block * EACH, EACH).to(tl.float32)
    out = OUT + (head * nqb + block) * nkb
    for j in range(0, nkb, AT):
        there = ((j + n) * EACH)[None, :] < seen[:, None]
        e = tl.load(SUMS + place[:, None] * (BN // EACH) + (j + n)[None, :], mask=there, other=0.0)
        m = tl.load(STAT + (place[:, None] + ((j + n) * EACH // BN)[None, :]) * 2, mask=there, other=-float("inf"))
        mass = tl.sum(e * tl.math.exp2(m - top[:, None]) * share[:, None], 0)
        tl.store(out + j + n, mass, mask=j + n < nkb)


def reasons(q: Tensor, k: Tensor, block: int, stride: int) -> list[str]:
    """Why these kernels cannot compute this; [] = they can."""
    why = device.triton_reasons(q.detach())
    if q.dtype not in device.HALVES:
        why.append(f"it multiplies 16-bit floats, and the inputs are {str(q.dtype).split('.')[-1]}")
    if (each := block // stride) & (each - 1) or each > EACH:
        why.append(f"blocks of {each} strides; it takes powers of two up to {EACH}")
    return why + ([] if q.numel() and k.numel() else ["there is nothing to read"])


@dataclass(frozen=True)
class Plan:
    """A tile's groups of queries and of keys (both no fewer than those of a block), channels of a step, warps, stages;
    how many sums are held at once, and tiles of rows beside one another.
    """

    rows: int
    keys: int
    channels: int
    warps: int
    stages: int
    most: int = MOST
    neighbours: int = NEIGHBOURS


def plan(q: Tensor) -> Plan:
    """By what a multiprocessor holds: 228 KiB on Hopper and data-centre Blackwell, 100 on the smallest."""
    size = max(16, triton.next_power_of_2(q.shape[-1]))
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        return Plan(128, 128, min(32, size), 8, 3)
    return Plan(128, 256, min(64, size), 8, 4)


def antidiagonal_mass(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    *,
    block: int,
    stride: int,
    scale: float,
    softcap: float | None,
    how: Plan | None = None,
) -> Float[Tensor, "b h nqb nkb"]:
    """See the op's api. `how` is for benchmarks and tests."""
    (b, h, queries, d), (g, keys) = q.shape, k.shape[1:3]
    how, each, cap = how or plan(q), block // stride, softcap or 1.0
    band = max(1, how.neighbours // (h // g))
    groups, tiles = triton.cdiv(queries, stride), triton.cdiv(triton.cdiv(keys, stride), how.keys)
    rows, step = b * h * tiles * (how.keys // each), band * how.rows
    span = min(max(1, how.most // (rows * step)) * step, triton.cdiv(groups, how.rows) * how.rows)
    sizes = {"dtype": torch.float32, "device": q.device}
    sums, stat = torch.empty(span * rows, **sizes), torch.empty(b * h * span * tiles * 2, **sizes)
    out = torch.empty(b, h, triton.cdiv(queries, block), triton.cdiv(keys, block), **sizes)
    scale *= LOG2E / stride if softcap is None else 1 / (stride * softcap)
    shape = {"STRIDE": stride, "EACH": each, "BN": how.keys}
    for first in range(0, groups, span):
        last = min(first + span, groups)
        ends = [min(first + (i + 1) * step, last) for i in range(triton.cdiv(last - first, step))]
        near = [triton.cdiv(min(end * stride + keys - queries, keys), stride * how.keys) for end in ends]
        width = max(a + z for a, z in zip(near, reversed(near)))
        _sums[(h // g * band * width * triton.cdiv(len(ends), 2) * b * g,)](
            q, k, sums, stat, *q.stride(), *k.stride(), scale, cap * LOG2E, queries, keys, h, first, len(ends), width,
            span, tiles, GROUP=h // g, CAPPED=softcap is not None, D=d, BM=how.rows, BK=how.channels, BAND=band,
            num_warps=how.warps, num_stages=how.stages, **shape,
        )  # fmt: skip
        _average[(triton.cdiv(last - first, each), b * h)](
            sums, stat, out, queries, keys, first, span, tiles, *out.shape[2:], AT=AT_ONCE, num_warps=4, **shape
        )
    return out
