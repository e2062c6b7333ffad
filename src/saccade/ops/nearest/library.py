"""Indexes over keys alone, by faiss: a graph of near keys (HNSW), and clusters (IVF)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import faiss
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from saccade.ops.nearest.api import Found
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
        done = [self._one(index, x, count) for index, x in zip(self._read, q.float().cpu())]
        index, score = (torch.stack([x[i] for x in done]).to(q.device) for i in (0, 1))
        return Found(index, score.to(wide(q).dtype), sum(visited for *_, visited in done))

    def _one(self, index: Any, q: Float[Tensor, "s d"], count: int) -> tuple[Tensor, Tensor, int]:
        graph = isinstance(index, faiss.IndexHNSW)
        stats = faiss.cvar.hnsw_stats if graph else faiss.cvar.indexIVF_stats
        stats.reset()
        if graph:
            options = faiss.SearchParametersHNSW(efSearch=max(self.effort, count))
        else:
            options = faiss.SearchParametersIVF(nprobe=min(self.effort, index.nlist))
        score, found = index.search(q.contiguous().numpy(), count, params=options)
        score = torch.from_numpy(score).masked_fill(torch.from_numpy(found) < 0, -torch.inf)
        return torch.from_numpy(found).int(), score, int(stats.ndis)

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


def _read(stored: UInt8[Tensor, " bytes"]) -> Any:
    """The index in these bytes, which it goes on to live in."""
    return faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(stored.numpy()), stored.numel()))
