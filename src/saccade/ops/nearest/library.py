"""Indexes by faiss: over keys alone a graph of near keys (HNSW) and clusters (IVF); and our graph from queries."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import faiss
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from saccade.ops.nearest.api import Found
from saccade.ops.nearest.graph import Graph
from saccade.ops.nearest.reference import every, wide

ROUNDS = 10  # of k-means


@dataclass(frozen=True)
class Library:
    """faiss reads its indexes where they lie in `stored`, one for each head, and copies nothing but small tables."""

    keys: Float[Tensor, "g n d"]
    stored: tuple[UInt8[Tensor, " bytes"], ...]
    effort: int
    _read: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_read", tuple(_read(x) for x in self.stored))

    def search(self, q: Float[Tensor, "g s d"], count: int) -> Found:
        """As faiss finds them, in float32."""
        n = self.keys.shape[1]
        if count >= n:
            return every(self.keys, q, count)
        graph = isinstance(self._read[0], faiss.IndexHNSW)
        stats = faiss.cvar.hnsw_stats if graph else faiss.cvar.indexIVF_stats
        stats.reset()
        done = _threads().map(lambda index, x: self._one(index, x, count), self._read, q.float().cpu())
        index, score = (torch.stack(x).to(q.device) for x in zip(*done))
        return Found(index, score.to(wide(q).dtype), int(stats.ndis))

    def _one(self, index: Any, q: Float[Tensor, "s d"], count: int) -> tuple[Tensor, Tensor]:
        if isinstance(index, faiss.IndexHNSW):
            options = faiss.SearchParametersHNSW(efSearch=max(self.effort, count))
        else:
            options = faiss.SearchParametersIVF(nprobe=min(self.effort, index.nlist))
        score, found = index.search(q.contiguous().numpy(), count, params=options)
        score = torch.from_numpy(score).masked_fill(torch.from_numpy(found) < 0, -torch.inf)
        return torch.from_numpy(found).int(), score

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.keys, *self.stored]

    def moved(self, move: Callable[[Tensor], Tensor]) -> Library:
        """With its keys elsewhere; faiss's own memory is the host's already."""
        return Library(move(self.keys), self.stored, self.effort)


def build(keys: Float[Tensor, "g n d"], kind: str, beam: int, probes: int, degree: int) -> Library:
    """An index of each head's keys."""
    stored = []
    for head in wide(keys).float().cpu():
        n, d = head.shape
        if kind == "hnsw":
            index = faiss.IndexHNSWFlat(d, max(2, degree // 2), faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = max(beam, 2 * degree)
        else:
            lists = max(1, min(n, int(4 * math.sqrt(n))))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.niter, index.cp.min_points_per_centroid = ROUNDS, 1
            index.train(head.contiguous().numpy())
        index.add(head.contiguous().numpy())
        stored.append(torch.from_numpy(faiss.serialize_index(index)))
    return Library(keys, tuple(stored), beam if kind == "hnsw" else probes)


def followed(graph: Graph) -> Library:
    """Our graph, for faiss to search: each head's on the lowest level, and above it the keys that searches begin at."""
    heads = zip(wide(graph.keys).float().cpu(), graph.edges.cpu(), graph.entries.cpu())
    short = {torch.bfloat16: faiss.ScalarQuantizer.QT_bf16, torch.float16: faiss.ScalarQuantizer.QT_fp16}
    stored = []
    for keys, edges, entries in heads:
        (n, d), half = keys.shape, (edges.shape[1] + 2) // 2  # a place more: from one entry to the next
        if graph.keys.dtype in short:
            index = faiss.IndexHNSWSQ(d, short[graph.keys.dtype], half, faiss.METRIC_INNER_PRODUCT)
        else:
            index = faiss.IndexHNSWFlat(d, half, faiss.METRIC_INNER_PRODUCT)
        index.storage.add(keys.contiguous().numpy())
        index.ntotal, index.is_trained = n, True
        _link(index.hnsw, edges, entries, half)
        stored.append(torch.from_numpy(faiss.serialize_index(index)))
    return Library(graph.keys, tuple(stored), graph.beam)


def _link(hnsw: Any, edges: Int[Tensor, "n m"], entries: Int[Tensor, " e"], half: int) -> None:
    """Neighbours of every key: `2 * half` places on the lowest level and, of an entry, `half` on the one above."""
    levels = torch.ones(len(edges), dtype=torch.int32)
    levels[entries.long()] = 2
    faiss.copy_array_to_vector(levels.numpy(), hnsw.levels)
    hnsw.prepare_level_tab(len(edges), True)
    ends = 2 * half * torch.ones(len(edges), dtype=torch.long) + half * (levels == 2)
    start = torch.nn.functional.pad(ends.cumsum(0), (1, 0))
    near = torch.from_numpy(faiss.rev_swig_ptr(hnsw.neighbors.data(), int(start[-1])))
    near.fill_(-1)
    ring = torch.stack([entries.roll(-i) for i in range(1, min(half, len(entries) - 1) + 1)] or [entries], 1)
    following = torch.full_like(edges[:, :1], -1)
    following[entries.long()] = ring[:, :1]
    places = torch.cat([edges, following], 1)
    places = places.gather(1, (places < 0).int().argsort(dim=1, stable=True))  # faiss stops where there is none
    near[start[:-1, None] + torch.arange(places.shape[1])] = places
    near[start[entries.long(), None] + 2 * half + torch.arange(ring.shape[1])] = ring
    hnsw.entry_point, hnsw.max_level = int(entries[0]), 1


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """One head each, for faiss itself takes the queries of one call apart, which are few."""
    return ThreadPoolExecutor(os.cpu_count(), "nearest", lambda: faiss.omp_set_num_threads(1))


def _read(stored: UInt8[Tensor, " bytes"]) -> Any:
    """The index in these bytes, which it goes on to live in."""
    return faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(stored.numpy()), stored.numel()))
