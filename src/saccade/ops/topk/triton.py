"""The places of the best scores by Triton, one program for each row, with no sort. Rows of more than `TILE`: `long.py`.

Floats are turned into whole numbers of the same order. A threshold is searched for between the least and the largest of
a row, in three parts a step, until as many as are wanted lie at or above it (or it can go no further: then equal scores
are at the edge, and the first of them are taken). The parts are equal as values and as whole numbers by turns: the one
is faster for what scores look like, the other ends soon whatever they look like. Prefix sums of what was chosen say
where each goes, so the list comes out ascending.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.ops import device

TILE = 16384  # scores of a row: they stay in registers


@triton.jit
def _keys(X, i, n):
    """Whole numbers in the order of the scores, as 32 bits without sign; 0: none there, or -inf. NaN is the largest."""
    x = tl.load(X + i, mask=i < n, other=-float("inf")).to(tl.float32) + 0.0  # -0 is 0
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ (-2147483648)
    key = tl.where(x != x, -2, key)
    return tl.where(x == -float("inf"), 0, key).to(tl.uint32, bitcast=True)


@triton.jit
def _value(key):
    """The float of a key."""
    bits = (key ^ 0x80000000).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key(value):
    """The key of a float, 64 bits."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def _thirds(low, high, turn):
    """Where the part between the two is cut next: equal parts as values and as whole numbers by turns."""
    third = (high - low + 2) // 3
    a, z = low + third, high - third
    if turn % 2 == 0:
        bottom, top = _value(low), _value(high)
        a, z = _key(bottom + (top - bottom) * 0.3333), _key(top - (top - bottom) * 0.3333)
    a = tl.minimum(tl.maximum(a, low + 1), high - 1)
    return a, tl.minimum(tl.maximum(z, a), high - 1)


@triton.jit
def _search(u, low, high, there, wanted, most):
    """A threshold that `wanted` to `most` keys reach, and how many do; more only where it is the last one's key."""
    more, turn = there, 0
    while (more > most) & (high - low > 1):
        a, z = _thirds(low, high, turn)
        # 16 bits for each count
        both = tl.sum((u >= a.to(tl.uint32)).to(tl.int32) + ((u >= z.to(tl.uint32)).to(tl.int32) << 16), 0)
        at_a, at_z = both & 0xFFFF, both >> 16
        if at_z >= wanted:
            low, more = z, at_z
        elif at_a >= wanted:
            low, more, high = a, at_a, z
        else:
            high = a
        turn += 1
    return low, more


@triton.jit
def _pick(u, keep, N: tl.constexpr):
    """Which keys are the best, and where each of them goes in an ascending list; how many there are."""
    there = tl.sum((u > 0).to(tl.int32), 0)
    wanted = tl.minimum(there, keep)
    low, high = tl.min(tl.where(u > 0, u, 0xFFFFFFFF), 0).to(tl.int64), tl.max(u, 0).to(tl.int64) + 1
    threshold, more = _search(u, low, high, there, wanted, wanted)
    edge = threshold.to(tl.uint32)
    same = (u == edge) & (u > 0)
    counts = ((u > edge) & (u > 0)).to(tl.int32) + (same.to(tl.int32) << 16)
    before = tl.cumsum(counts, 0) - counts
    # how many of the equal ones are taken
    spare = tl.where(more == wanted, N, wanted - (tl.sum(counts, 0) & 0xFFFF))
    equal = before >> 16
    chosen = ((counts & 0xFFFF) > 0) | (same & (equal < spare))
    return chosen, (before & 0xFFFF) + tl.minimum(equal, spare), wanted


@triton.jit
def _choose(X, OUT, START, SEEN, n, keep, rows, total, N: tl.constexpr, PACKED: tl.constexpr, WAIT: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """One row.

    PACKED: lists of different lengths lie behind one another, those of `rows` rows in `total`: row i from START[i] to
    START[i + 1], of its first SEEN[i] scores, -inf among them.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    X += row * n
    if PACKED:
        start = tl.load(START + row % rows)
        keep = tl.load(START + row % rows + 1) - start
        OUT += row // rows * total + start
        n = tl.load(SEEN + row % rows)
    else:
        OUT += row * keep
    if WAIT:
        gdc_wait()
    u = _keys(X, i, n)
    if PACKED:  # a list is as long as was said
        u = tl.where((i < n) & (u == 0), 1, u)
    chosen, place, wanted = _pick(u, keep, N)
    tl.store(OUT + place, i, mask=chosen)
    if not PACKED:
        tl.store(OUT + i, -1, mask=(i >= wanted) & (i < keep))


def warps(n: int) -> int:
    """For rows of so many scores: few, since every step of the search waits for all of them."""
    return max(1, min(8, n // 512))


def topk(scores: Float[Tensor, "*rows n"], keep: int, follows: bool = False, few: int = 0) -> Int[Tensor, "*rows k"]:
    """See the op's api.

    follows: the kernel before this one says itself when this one may start (dependent launch)
    few: warps, for benchmarks
    """
    if scores.shape[-1] > TILE:
        from saccade.ops.topk import long

        return long.topk(scores, keep)
    flat, n = scores.contiguous(), scores.shape[-1]
    out = torch.empty(*scores.shape[:-1], keep, dtype=torch.int32, device=scores.device)
    early = device.dependent_launch(scores.device.index)
    wide = triton.next_power_of_2(n)
    launch = {"launch_pdl": True} if early and follows else {}
    _choose[(out.numel() // keep,)](
        flat, out, out, out, n, keep, 1, 0, N=wide, PACKED=False, WAIT=early and follows, PDL=early,
        num_warps=few or warps(wide), **launch,
    )  # fmt: skip
    return out


def packed(
    scores: Float[Tensor, "*heads rows n"], start: Int[Tensor, " rows+1"], seen: Int[Tensor, " rows"], total: int
) -> Int[Tensor, "*heads total"]:
    """The best start[i + 1] - start[i] of the first seen[i] scores of row i, lists behind one another."""
    rows, n = scores.shape[-2:]
    out = torch.empty(*scores.shape[:-2], total, dtype=torch.int32, device=scores.device)
    wide = triton.next_power_of_2(n)
    _choose[(scores.numel() // n,)](
        scores, out, start, seen, n, 0, rows, total, N=wide, PACKED=True, WAIT=False, PDL=False, num_warps=warps(wide),
    )  # fmt: skip
    return out
