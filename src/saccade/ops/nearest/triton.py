"""The search of a graph by Triton: on the device, over an index that stays in host memory.

A query is one program. Its beam is one row of numbers, score above key, sorted; new keys are sorted the other way
round, the larger of each pair is kept, and what is kept is sorted again. Neighbours and keys are read where they lie:
of pinned memory only what is asked for goes over the bus. A bit for each key and query, on the device, says what was
met.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saccade.ops import device
from saccade.ops.nearest.api import Found
from saccade.ops.topk.triton import _key, _value
from saccade.ops.unclaimed import unclaimed

WIDEST = 1024  # keys of a beam
HELD = 128  # numbers of keys that a thread holds at a time
NOTES = 2**31  # bits of what was met, at once


@triton.jit
def _packed(score, key):
    """Numbers of the order of the scores, with the key and that it is to be followed in the lower half."""
    return ((_key(score) - 0x80000000) << 32) | (key.to(tl.int64) << 1) | 1


@triton.jit
def _place(packed):
    """The key."""
    return ((packed & 0xFFFFFFFF) >> 1).to(tl.int32)


@triton.jit
def _scores(Q, KEYS, key, there, k_n, D: tl.constexpr, STEP: tl.constexpr):
    """Of one query with keys at these places; some numbers of every key at a time."""
    s = tl.zeros(key.shape, tl.float32)
    for first in tl.static_range(0, D, STEP):
        d = first + tl.arange(0, STEP)
        q = tl.load(Q + d, mask=d < D, other=0.0).to(tl.float32)
        at = KEYS + key.to(tl.int64)[:, None] * k_n + d[None, :]
        k = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        s += tl.sum(k * q[None, :], 1)
    return s


# fmt: off
@triton.jit(do_not_specialize=["n", "words", "queries", "width", "together"])
def _search(Q, KEYS, EDGES, ENTRIES, MET, NEXT, INDEX, SCORE, VISITED, k_g, k_n, n, words, queries, width, together,
            E: tl.constexpr, M: tl.constexpr, D: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr):
# fmt: on
    """One query: follow the best keys that were not followed yet, until none of the beam is left."""
    row = tl.program_id(0).to(tl.int64)
    head, i, none = row // queries, tl.arange(0, W), -(2**63)
    Q += row * D
    MET += row * words
    NEXT += row * W
    KEYS += head * k_g
    EDGES += head * n * M
    beam = tl.full([W], none, tl.int64)
    near = tl.load(ENTRIES + head * E + i, mask=i < E, other=-1)
    visited, left = 0, 1
    while left > 0:
        bit = 1 << (near & 31)
        fresh = (tl.atomic_or(MET + (near >> 5), bit, mask=near >= 0) & bit) == 0
        fresh = fresh & (near >= 0)
        visited += tl.sum(fresh.to(tl.int32), 0)
        new = tl.where(fresh, _packed(_scores(Q, KEYS, near, fresh, k_n, D, STEP), near), none)
        beam = tl.sort(tl.maximum(beam, tl.sort(new)), descending=True)
        beam = tl.where(i < width, beam, none)
        waits = ((beam & 1) == 1).to(tl.int32)
        rank = tl.cumsum(waits, 0) - waits
        taken = (waits == 1) & (rank < together)
        left = tl.sum(taken.to(tl.int32), 0)
        tl.store(NEXT + rank, _place(beam), mask=taken)
        beam = tl.where(taken, beam - 1, beam)
        tl.debug_barrier()  # all of a program see what it stored
        key = tl.load(NEXT + i // M, mask=i // M < left, other=0)
        near = tl.load(EDGES + key.to(tl.int64) * M + unclaimed(W) % M, mask=i // M < left, other=-1)
        tl.debug_barrier()
    there = beam != none
    tl.store(INDEX + row * W + i, tl.where(there, _place(beam), -1))
    tl.store(SCORE + row * W + i, tl.where(there, _value((beam >> 32) + 0x80000000), -float("inf")))
    tl.store(VISITED + row, visited)


def search(graph: Any, q: Float[Tensor, "g s d"], count: int, together: int) -> Found:
    """Best first. together: keys that are followed at once, if their neighbours are no more than the beam is wide."""
    g, n, _ = graph.keys.shape
    found = [_some(graph, x.contiguous(), count, together) for x in q.split(max(1, NOTES // (g * n)), 1)]
    index, score = (torch.cat([f[i] for f in found], 1) if len(found) > 1 else found[0][i] for i in (0, 1))
    return Found(index, score, sum(f.visited for f in found))


def _some(graph: Any, q: Float[Tensor, "g s d"], count: int, together: int) -> Found:
    (g, s, d), (_, n, m), e = q.shape, graph.edges.shape, graph.entries.shape[1]
    width, wide = max(graph.beam, count), _wide(graph, count)
    warps = max(4, min(16, wide // 32))
    step = min(triton.next_power_of_2(d), max(16, HELD * 32 * warps // wide))
    index = torch.empty(g * s, wide, dtype=torch.int32, device=q.device)
    score = torch.empty_like(index, dtype=torch.float32)
    met = index.new_zeros(g * s, triton.cdiv(n, 32))
    visited = index.new_empty(g * s)
    _search[(g * s,)](
        q, graph.keys, graph.edges, graph.entries, met, torch.empty_like(index), index, score, visited,
        *graph.keys.stride()[:2], n, met.shape[1], s, width, max(1, min(together, wide // m)),
        E=e, M=m, D=d, W=wide, STEP=step, num_warps=warps,
    )  # fmt: skip
    return Found(*(x[:, :count].unflatten(0, (g, s)) for x in (index, score)), visited.sum())


def _wide(graph: Any, count: int) -> int:
    """Places of a beam, which also holds what is new: the entries, or the neighbours of a key."""
    return triton.next_power_of_2(max(graph.beam, count, graph.edges.shape[2], graph.entries.shape[1]))


def reasons(graph: Any, q: Tensor, count: int) -> list[str]:
    """Why the kernel cannot search for q, on a device that it runs on; [] = it can."""
    wide, kinds = _wide(graph, count), {q.dtype, graph.keys.dtype} - {*device.HALVES, torch.float32}
    why = [f"a beam of {wide} keys; it takes {WIDEST} at most"] if wide > WIDEST else []
    why += [f"{kind} inputs; it compares in float32" for kind in kinds]
    if graph.keys.stride(2) != 1:
        why.append("the numbers of a key do not lie beside each other")
    if not all(device.within_reach(x, q) for x in graph.tensors()):
        why.append(f"parts of the index lie neither on the {q.device.type} device nor in pinned host memory")
    return why
