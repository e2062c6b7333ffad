"""A graph of keys that the same queries want. Built from queries, since queries do not lie where keys lie.

Each query names its best keys, best first. Keys that stand beside each other in such a list, or in one with its first
key, are neighbours; the query itself is dropped. A key keeps the neighbours that it shares most queries with, leaving
out one that is nearer to a neighbour it has than to itself. What no list leads to hangs on at the nearest key that can
be reached: so every key can be, and a beam as wide as there are keys finds all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.ops import device
from saccade.ops.nearest.api import Found
from saccade.ops.nearest.reference import every, wide

LISTED = 100  # best keys of a query
BESIDE = 4  # how far apart in a list neighbours stand
ENTRIES = 32  # keys that a search begins at: those that come first for most queries
WIDTH = 4  # keys of the beam that are followed at once, at least
TURNS = 16  # of following, or so, until a beam is followed: one that holds many keys follows many at once
ROWS = 512  # queries that are searched for together, and keys that are compared
NOTES = 2**25  # of keys that were met, held at once


@dataclass(frozen=True)
class Graph:
    """Neighbours of each key (-1: none), where searches begin, and how wide they are."""

    keys: Float[Tensor, "g n d"]
    edges: Int[Tensor, "g n m"]
    entries: Int[Tensor, "g e"]
    beam: int

    def search(self, q: Float[Tensor, "g s d"], count: int) -> Found:
        """Best first: follow the best keys that were not followed yet, until none of the beam is left."""
        g, n, _ = self.keys.shape
        if count >= n:
            return every(self.keys, q, count)
        width = max(self.beam, count)
        together = max(WIDTH, width // TURNS)
        if q.is_cuda and not device.machine_reasons(q):
            from saccade.ops.nearest import triton as kernel

            if not kernel.reasons(self, q, count):
                return kernel.search(self, q, count, together)
        asking = wide(q.to(self.keys.device)).flatten(0, 1)
        head = torch.arange(g, device=asking.device).repeat_interleave(q.shape[1])
        some = max(1, min(ROWS, NOTES // n))
        found = [_search(self, x, h, width, together) for x, h in zip(asking.split(some), head.split(some))]
        index, score = (torch.cat([f[i][:, :count] for f in found]).unflatten(0, (g, -1)) for i in (0, 1))
        return Found(index.to(q.device), score.to(q.device), sum(f.visited for f in found))

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.keys, self.edges, self.entries]

    def moved(self, move: Callable[[Tensor], Tensor]) -> Graph:
        """With all of it elsewhere."""
        return Graph(move(self.keys), move(self.edges), move(self.entries), self.beam)


# --- search -----------------------------------------------------------------------------------------------------------


class Beam(NamedTuple):
    """The best keys so far of each row, and which of them were followed."""

    key: Int[Tensor, "r e"]
    score: Float[Tensor, "r e"]
    followed: Tensor

    def kept(self, width: int, ordered: bool = False) -> Beam:
        """The best `width`; best first, if `ordered`."""
        score, order = self.score.topk(min(width, self.score.shape[1]), -1, sorted=ordered)
        return Beam(self.key.gather(1, order), score, self.followed.gather(1, order))


def _search(graph: Graph, q: Float[Tensor, "r d"], head: Int[Tensor, " r"], width: int, together: int) -> Found:
    n = graph.keys.shape[1]
    met = torch.zeros(len(q), n + 1, dtype=torch.int32, device=q.device)  # 0: not yet; the last place is for "none"
    start = _fresh(graph.entries[head].long(), met, n, 1)
    beam, visited = _scored(graph, q, head, start).kept(width), int((start < n).sum())
    step = 1 + start.shape[1]
    while True:
        open_score, order = beam.score.masked_fill(beam.followed, -torch.inf).topk(min(together, beam.key.shape[1]), -1)
        live = open_score > -torch.inf
        if not bool(live.any()):
            beam = beam.kept(width, ordered=True)
            return Found(torch.where(beam.score > -torch.inf, beam.key, -1).int(), beam.score, visited)
        near = graph.edges[head[:, None], beam.key.gather(1, order).clamp(max=n - 1)].long()
        near = torch.where(live[..., None] & (near >= 0), near, n).flatten(1)
        near = _fresh(near, met, n, step)
        step, visited = step + near.shape[1], visited + int((near < n).sum())
        beam = beam._replace(followed=beam.followed.scatter(1, order, True))
        new = _scored(graph, q, head, near)
        beam = Beam(*(torch.cat(pair, 1) for pair in zip(beam, new))).kept(width)


def _fresh(near: Int[Tensor, "r m"], met: Int[Tensor, "r n"], none: int, step: int) -> Int[Tensor, "r m"]:
    """What was not met before, each once; `none` in the place of the rest. It is met now, under numbers from `step`."""
    near = torch.where(met.gather(1, near) > 0, none, near)
    number = torch.arange(step, step + near.shape[1], dtype=torch.int32, device=near.device).expand_as(near)
    met.scatter_(1, near, number)
    first = met.gather(1, near) == number  # of the same key twice, one number was left
    met[:, none] = 0
    return torch.where(first, near, none)


def _scored(graph: Graph, q: Float[Tensor, "r d"], head: Int[Tensor, " r"], key: Int[Tensor, "r m"]) -> Beam:
    """`key` with its products; -inf for none, which are most: they are left out."""
    none = key == graph.keys.shape[1]
    row, place = (~none).nonzero(as_tuple=True)
    score = torch.full(key.shape, -torch.inf, dtype=q.dtype, device=q.device)
    score[row, place] = (wide(graph.keys[head[row], key[row, place]]) * q[row]).sum(-1)
    return Beam(key, score, none)


# --- building ---------------------------------------------------------------------------------------------------------


def build(keys: Float[Tensor, "g n d"], queries: Float[Tensor, "g m d"], beam: int, degree: int) -> Graph:
    """The graph of each head."""
    made = [_head(wide(k), wide(q), degree) for k, q in zip(keys, queries)]
    return Graph(keys, torch.stack([edges for edges, _ in made]), torch.stack([entries for _, entries in made]), beam)


def _head(keys: Float[Tensor, "n d"], queries: Float[Tensor, "m d"], degree: int) -> tuple[Tensor, Tensor]:
    n = len(keys)
    degree = min(degree, max(1, n - 1))
    listed = torch.cat([(q @ keys.mT).topk(min(LISTED, n), -1).indices for q in queries.split(ROWS)])
    entries = listed[:, 0].bincount(minlength=n).topk(min(ENTRIES, n)).indices
    edges = _thinned(keys, _shared(listed, n, 2 * degree), degree)
    return torch.cat([edges, _tails(keys, edges, entries)[:, None]], 1).int(), entries.int()


def _shared(listed: Int[Tensor, "m l"], n: int, most: int) -> Int[Tensor, "n c"]:
    """For each key those it shares most queries with, most first; -1 for none. With each pair the other way round."""
    code, count = _pairs(listed, n).unique(return_counts=True)
    one, other, count = torch.cat([code // n, code % n]), torch.cat([code % n, code // n]), count.repeat(2)
    order = count.argsort(descending=True, stable=True)
    order = order[one[order].argsort(stable=True)]
    one, other = one[order], other[order]
    rank = torch.arange(len(one), device=one.device) - torch.searchsorted(one, torch.arange(n, device=one.device))[one]
    out = torch.full((n, most), -1, device=listed.device)
    out[one[rank < most], rank[rank < most]] = other[rank < most]
    return out


def _pairs(listed: Int[Tensor, "m l"], n: int) -> Int[Tensor, " p"]:
    """Of keys that a query makes neighbours, as smaller * n + larger."""
    pairs = [(listed[:, :1].expand_as(listed[:, BESIDE + 1 :]), listed[:, BESIDE + 1 :])]
    pairs += [(listed[:, :-gap], listed[:, gap:]) for gap in range(1, BESIDE + 1) if gap < listed.shape[1]]
    return torch.cat([(torch.minimum(a, b) * n + torch.maximum(a, b)).flatten() for a, b in pairs])


def _thinned(keys: Float[Tensor, "n d"], near: Int[Tensor, "n c"], degree: int) -> Int[Tensor, "n m"]:
    """The first `degree` neighbours of each key that are nearer to it than to one before them; then the others."""
    out = near[:, :degree].clone()
    many = (near[:, min(degree, near.shape[1] - 1)] >= 0).nonzero()[:, 0]  # the rest has room for all
    for rows in many.split(ROWS):
        some = near[rows]
        points = keys[some.clamp(min=0)]
        own, between = (points - keys[rows, None]).norm(dim=-1), torch.cdist(points, points)
        there, kept = some >= 0, torch.zeros_like(some, dtype=torch.bool)
        for i in range(some.shape[1]):
            hidden = (kept & (between[:, i] < own[:, i : i + 1])).any(-1)
            kept[:, i] = there[:, i] & ~hidden & (kept.sum(-1) < degree)
        order = (2 - there.int() - kept.int()).sort(dim=-1, stable=True).indices[:, :degree]
        out[rows] = some.gather(1, order)
    return out


def _tails(keys: Float[Tensor, "n d"], edges: Int[Tensor, "n m"], entries: Int[Tensor, " e"]) -> Int[Tensor, " n"]:
    """One more neighbour each: keys that no search comes to hang in a row, the nearest first, on the nearest that it
    does come to."""
    reached = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    front = entries
    while front.numel():
        reached[front] = True
        front = edges[front].unique()
        front = front[front >= 0]
        front = front[~reached[front]]
    lost, known = (~reached).nonzero()[:, 0], reached.nonzero()[:, 0]
    tails = torch.full_like(edges[:, 0], -1)
    if not lost.numel():
        return tails
    away, place = map(torch.cat, zip(*[torch.cdist(keys[x], keys[known]).min(-1) for x in lost.split(ROWS)]))
    order = away.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    lost, anchor = lost[order], known[place[order]]
    first = torch.ones_like(anchor, dtype=torch.bool)
    first[1:] = anchor[1:] != anchor[:-1]
    tails[torch.where(first, anchor, lost.roll(1))] = lost
    return tails
