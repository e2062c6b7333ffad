"""The places of the best scores of long rows by Triton, every row shared by many programs.

1. One program for each row looks at a sample of it, a score at a random place of every so many, and finds a bound that
   somewhat more than are wanted should reach (how many more follows from what a sample of that size can be off by).
2. One program for each part of a row keeps what reaches the bound, in order: it says how many it has, and waits for
   what the parts before it said. Row and bound are read at the same time, since one does not need the other.
3. One program for each row chooses among the few that are left as `triton.py` does.

The sample decides how long it takes, never what is chosen. Where too few or too many reach the bound (many equal scores
at the edge) the third program reads the whole row: once to find its ends, once to see whether the bound itself is the
edge, then as often as the search between the ends asks for. None waits for the host.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.ops import device
from saccade.ops.topk.triton import TILE, _keys, _pick, _search, _thirds, warps

VARYING = ("every", "wanted", "most", "parts", "keep")  # from step to step of decoding: compiled once for all values
SURE = 4.5  # standard deviations of a sample's count between what is aimed at and what is too few, or too many


@dataclass(frozen=True)
class Plan:
    """sample: scores of a row that are looked at first; tile: the most that may be left; part: scores of a program, and
    step: how many of them are put in their places at a time."""

    sample: int
    tile: int
    part: int = 4096
    step: int = 512
    part_warps: int = 8
    sample_warps: int = 8
    tile_warps: int = 8


@functools.lru_cache(maxsize=512)
def plan(n: int, keep: int) -> Plan:
    """The least work for which the sample is sure enough."""

    def doubt(sample: int, tile: int) -> float:
        return max(0.0, SURE - (math.sqrt(tile) - math.sqrt(keep)) / math.sqrt(triton.cdiv(n, sample)))

    sizes = [size for size in (1024, 2048, 4096, 8192, 16384) if size <= TILE]
    pairs = [(sample, tile) for sample in sizes for tile in sizes if tile > keep]
    sample, tile = min(pairs, key=lambda pair: (doubt(*pair), sum(pair)))
    return Plan(sample, tile, sample_warps=warps(sample), tile_warps=warps(tile))


@triton.jit(do_not_specialize=VARYING)
def _sample(X, BOUND, COUNT, n, every, wanted, most, parts, S: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr):
    """Of one row: a key that `wanted` to `most` of its sample reach, 1 where it has fewer; no part has counted yet."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part, i = tl.arange(0, P), tl.arange(0, S)
    tl.store(COUNT + row * parts + part, 0, mask=part < parts)
    u = _keys(X + row * n, i * every + ((i * 40503) >> 7) % every, n)
    there = tl.sum((u > 0).to(tl.int32), 0)
    low, high = tl.min(tl.where(u > 0, u, 0xFFFFFFFF), 0).to(tl.int64), tl.max(u, 0).to(tl.int64) + 1
    bound, _ = _search(u, low, high, there, wanted, most)
    tl.store(BOUND + row, tl.where(there < wanted, 1, bound).to(tl.uint32).to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=VARYING)
def _sieve(X, BOUND, COUNT, KEYS, PLACES, n, parts, room, N: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """Of one part of a row: the keys that reach the bound and their places, behind those of the parts before it."""
    if PDL:
        gdc_launch_dependents()
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    first, other = part * N, tl.arange(0, P)
    X += row * n
    KEYS += row * room
    PLACES += row * room
    COUNT += row * parts
    whole = _keys(X, first + tl.arange(0, N), n)
    if PDL:
        gdc_wait()
    bound = tl.load(BOUND + row).to(tl.uint32, bitcast=True)
    tl.atomic_xchg(COUNT + part, tl.sum((whole >= bound).to(tl.int32), 0) + 1, sem="relaxed")  # 0 is: not yet counted
    said = tl.load(COUNT + other, mask=other < part, other=1, volatile=True)
    while tl.min(said, 0) == 0:  # programs start in their order: those waited for run, or have ended
        said = tl.load(COUNT + other, mask=other < part, other=1, volatile=True)
    done = tl.sum(said - 1, 0)
    for at in range(0, N, STEP):  # read again, near by: keeping all in registers left too few programs room
        i = first + at + tl.arange(0, STEP)
        u = _keys(X, i, n)
        kept = (u >= bound).to(tl.int32)
        place = done + tl.cumsum(kept, 0) - kept
        chosen = (kept > 0) & (place < room)
        tl.store(KEYS + place, u.to(tl.int32, bitcast=True), mask=chosen)
        tl.store(PLACES + place, i, mask=chosen)
        done += tl.sum(kept, 0)


@triton.jit
def _count(X, n, a, z, N: tl.constexpr):
    """How many keys of a row reach each of two."""
    more = tl.zeros([N], tl.int32)
    fewer = tl.zeros([N], tl.int32)
    for at in range(0, n, N):
        u = _keys(X, at + tl.arange(0, N), n)
        more += (u >= a.to(tl.uint32)).to(tl.int32)
        fewer += (u >= z.to(tl.uint32)).to(tl.int32)
    return tl.sum(more, 0), tl.sum(fewer, 0)


@triton.jit
def _edge(X, n, keep, bound, N: tl.constexpr):
    """Of a whole row: the last one's key, how many are wanted, and how many of those are equal to it."""
    there = tl.zeros([N], tl.int32)
    least, most = tl.full([N], 0xFFFFFFFF, tl.uint32), tl.zeros([N], tl.uint32)
    for at in range(0, n, N):
        u = _keys(X, at + tl.arange(0, N), n)
        there += (u > 0).to(tl.int32)
        least, most = tl.minimum(least, tl.where(u > 0, u, 0xFFFFFFFF)), tl.maximum(most, u)
    low, high, more, above = tl.min(least, 0).to(tl.int64), tl.max(most, 0).to(tl.int64) + 1, tl.sum(there, 0), 0
    wanted = tl.minimum(more, keep)
    turn = -1
    while (more > wanted) & (high - low > 1):
        a, z = _thirds(low, high, turn)
        if turn < 0:  # the bound itself, for where many are equal to it
            a = tl.minimum(tl.maximum(bound, low + 1), high - 1)
            z = tl.minimum(a + 1, high - 1)
        at_a, at_z = _count(X, n, a, z, N)
        if at_z >= wanted:
            low, more = z, at_z
        elif at_a >= wanted:
            low, more, high, above = a, at_a, z, at_z
        else:
            high, above = a, at_a
        turn += 1
    return low.to(tl.uint32), wanted, tl.where(more == wanted, n, wanted - above)


@triton.jit(do_not_specialize=VARYING)
def _finish(X, BOUND, COUNT, KEYS, PLACES, OUT, n, keep, parts, N: tl.constexpr, P: tl.constexpr, STEP: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """One row, from what reached the bound, or from all of it where that was too few or too many."""
    row = tl.program_id(0).to(tl.int64)
    i, part = tl.arange(0, N), tl.arange(0, P)
    X += row * n
    OUT += row * keep
    if PDL:
        gdc_wait()
    left = tl.sum(tl.load(COUNT + row * parts + part, mask=part < parts, other=1) - 1, 0)
    bound = tl.load(BOUND + row).to(tl.uint32, bitcast=True).to(tl.int64)
    if (left <= N) & ((left >= keep) | (bound == 1)):
        u = tl.load(KEYS + row * N + i, mask=i < left, other=0).to(tl.uint32, bitcast=True)
        chosen, to, wanted = _pick(u, keep, N)
        tl.store(OUT + to, tl.load(PLACES + row * N + i, mask=chosen), mask=chosen)
    else:
        edge, wanted, spare = _edge(X, n, keep, bound, STEP)
        larger, equal = 0, 0
        for at in range(0, n, STEP):
            place = at + tl.arange(0, STEP)
            u = _keys(X, place, n)
            same = (u == edge) & (u > 0)
            counts = ((u > edge) & (u > 0)).to(tl.int32) + (same.to(tl.int32) << 16)
            before = tl.cumsum(counts, 0) - counts
            twins = equal + (before >> 16)
            chosen = ((counts & 0xFFFF) > 0) | (same & (twins < spare))
            tl.store(OUT + larger + (before & 0xFFFF) + tl.minimum(twins, spare), place, mask=chosen)
            both = tl.sum(counts, 0)
            larger += both & 0xFFFF
            equal += both >> 16
    for at in range(wanted, keep, STEP):
        to = at + tl.arange(0, STEP)
        tl.store(OUT + to, -1, mask=to < keep)


def topk(scores: Float[Tensor, "*rows n"], keep: int, how: Plan | None = None) -> Int[Tensor, "*rows k"]:
    """See the op's api. how: other sizes than those of `plan`, for benchmarks and tests."""
    flat, n = scores.contiguous(), scores.shape[-1]
    rows, how = flat.numel() // n, how or plan(n, keep)
    every, parts = triton.cdiv(n, how.sample), triton.cdiv(n, how.part)
    aim = (math.sqrt(keep) + math.sqrt(how.tile)) ** 2 / 4  # as sure not to be too few as not to be too many
    wanted = max(1, int(aim / every))
    whole = functools.partial(torch.empty, dtype=torch.int32, device=scores.device)
    out = whole(*scores.shape[:-1], keep)
    bound, count, kept = whole(rows), whole(rows, parts), whole(2, rows, how.tile)
    pdl, wide = device.dependent_launch(scores.device.index), triton.next_power_of_2(parts)
    early = {"launch_pdl": True} if pdl else {}
    _sample[(rows,)](flat, bound, count, n, every, wanted, wanted + wanted // 16, parts, S=how.sample, P=wide, PDL=pdl,
                     num_warps=how.sample_warps)  # fmt: skip
    _sieve[(rows * parts,)](flat, bound, count, kept[0], kept[1], n, parts, how.tile, N=how.part, STEP=how.step, P=wide,
                            PDL=pdl, num_warps=how.part_warps, **early)  # fmt: skip
    _finish[(rows,)](flat, bound, count, kept[0], kept[1], out, n, keep, parts, N=how.tile, P=wide,
                     STEP=min(4096, how.tile), PDL=pdl, num_warps=how.tile_warps, **early)  # fmt: skip
    return out
