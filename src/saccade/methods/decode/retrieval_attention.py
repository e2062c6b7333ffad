"""RetrievalAttention: the middle of the text lies in host memory, and an index built from queries finds keys there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.budget import FULL
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Decode
from saccade.core.selection import Gather, Selection, column, dense
from saccade.core.site import Seen, Site


class Share(NamedTuple):
    """Of the keys that one query reads: the first, the newest, and those that are searched for."""

    sinks: int
    window: int
    searched: int


@dataclass(frozen=True)
class RetrievalAttention(Decode):
    """Each query reads the first keys, the newest, and the best of the others, which an index in host memory finds.

    At the end of the prompt all but the first and last tokens go to host memory, under an index of each key/value head.
    A new query reads  W = {sinks, window}  on the device and  Omega = top_K q.k  of the rest, and the two are merged:
    lse = log(e^lse_W + e^lse_Omega),  o = e^(lse_W - lse) o_W + e^(lse_Omega - lse) o_Omega.
    Queries lie elsewhere than keys: an index over keys alone must look at many. Here keys are neighbours if the same
    queries of the prompt want them, and a search goes where queries go.

    sink_tokens, window_tokens: of W, and what stays on the device
    search: the index: that "graph", or "graph-faiss", which faiss searches; "hnsw", of near keys, and "ivf", clusters
        of keys, both by faiss; "flat", every key
    beam_keys: of the graphs: the best keys so far that a search goes on from, at least K
    probes: of "ivf": clusters that a search looks into
    neighbours: of the graphs: most neighbours of a key
    query_tokens: last tokens of the prompt whose queries build our graph

    Raises:
        BadOption: a number that is 0.
        CannotRun: "graph-faiss", "hnsw" or "ivf" without faiss; tokens taken back that lie in host memory.
    Source: arXiv 2409.10516, version 3, section 3; the graph after RoarGraph, arXiv 2408.08933. The authors' graph is
    not public, and microsoft/MInference, retr_attn.py (a flat index), could not be had: not compared with.
    """

    shelves: ClassVar[bool] = True
    card = Card(
        name="retrieval-attention",
        title="RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
        family="decode",
        paper="arXiv:2409.10516",
        year=2024,
        authors="Liu, Chen, Lu, Jiang, Han, Zhang, Chen, Zhang, Ding, Zhang, Chen, Yang, Yang, Qiu",
        official="microsoft/RetrievalAttention",
        licence_of_official="MIT",
        summary="Keys in host memory under an index built from the prompt's queries; a new query reads what it finds.",
        equation="o = merge(attend(q, K_W), attend(q, K_Omega));  Omega = top_K q.k of the rest, by a search",
        budget="stored keys that each new query reads, sinks and window included",
        needs=("queries",),
        departures=(
            "The budget sets K: what sinks and window leave of it. The paper reads 128 + 512 and K = 100 or 2000. Where"
            " the budget is small, sinks get a quarter of it at most and the window half; the others on the device"
            " then compete with those in host memory, exactly.",
            "What is decoded stays on the device and, once it leaves the window, competes so too: the index is built"
            " once. The paper inserts it; the authors' code has that as an option.",
            "The graph is built from the last query_tokens queries of the prompt, not from all: they lie where the next"
            " will, and of 8k tokens 256 of them led to as many of the best keys as 2,048 did.",
            "Keys that stand near each other in a query's list are neighbours too, not only with its first key, and"
            " candidates are ranked by how many queries they share: measured, it finds more for as many keys visited."
            " Keys that no query listed hang on at the nearest that one did.",
            "Keys and graph lie in pinned host memory, and on CUDA a kernel searches there, with beams of up to 1,024"
            " keys: over the bus goes what it visits, and what was found, which is attended to on the device. The paper"
            " searches and attends on the CPU, beside.",
            "Elsewhere the graph is searched in plain PyTorch, step by step: it visits few keys, and among some"
            " thousands still takes longer than one product with all of them (flat). search=graph-faiss has faiss"
            " follow it.",
            "All layers search, as in the paper; the authors' code leaves some first layers whole.",
        ),
        lacks={"backward": "it reads a cache, which training does not have"},
    )

    sink_tokens: int = 128
    window_tokens: int = 512
    search: Literal["graph", "graph-faiss", "hnsw", "ivf", "flat"] = "graph"
    beam_keys: int = 128
    probes: int = 32
    neighbours: int = 35
    query_tokens: int = 256

    def __post_init__(self):
        super().__post_init__()
        for name in ("window_tokens", "beam_keys", "probes", "neighbours", "query_tokens"):
            if getattr(self, name) < 1:
                text = "it takes at least 1"
                raise BadOption(f"retrieval-attention.{name}=0", text, "Leave it away for our value.")

    @property
    def replays(self) -> bool:
        return self.search == "graph"  # which the device itself searches

    @property
    def observe_tokens(self) -> int:
        return self.query_tokens

    def check(self, site: Site) -> list[str]:
        return [] if site.budget == FULL else ops.index_reasons(self.search)

    def shelve(self, seen: Seen, site: Site) -> tuple[int, Sequence[Any]] | None:
        first, last = self.sink_tokens, site.keys - self.window_tokens
        if last <= first or site.budget.tokens(site.keys, site.bytes_per_token) == site.keys:
            return None
        assert seen.queries is not None, "the card asks for queries"
        queries = seen.queries.unflatten(1, (site.kv_heads, -1)).flatten(2, 3)
        options = {"beam": self.beam_keys, "probes": self.probes, "degree": self.neighbours}
        pairs = zip(seen.keys[:, :, first:last], queries)
        return first, [ops.index_keys(k, q, self.search, **options) for k, q in pairs]

    def select(self, q: Float[Tensor, "b h q d"], stored: Mapping[str, Tensor], site: Site) -> Selection:
        counts = [site.budget.tokens(n, site.bytes_per_token) for n in range(site.offset + 1, site.keys + 1)]
        if not site.far and counts == list(range(site.offset + 1, site.keys + 1)):
            return dense(site.queries, site.keys)
        shares = [self._share(count, n, site) for n, count in enumerate(counts, site.offset + 1)]
        sinks, window, wanted = (column(numbers, q.device) for numbers in zip(*shares))
        near, near_score = self._near(q, stored["keys"], sinks, window, site)
        far, far_score = self._far(q, [share.searched for share in shares], site)
        index, score = torch.cat([near.expand_as(near_score), far], -1), torch.cat([near_score, far_score], -1)
        best = score.topk(min(max(s.searched for s in shares), score.shape[-1]), -1)
        spare = (torch.arange(best.indices.shape[-1], device=q.device) >= wanted) | (best.values == -torch.inf)
        end = torch.arange(site.offset + 1, site.keys + 1, device=q.device)[:, None]
        ranges = torch.stack([torch.cat([0 * end, end - window], -1), torch.cat([sinks, end], -1)], -1)
        return Gather(
            index=index.gather(-1, best.indices).masked_fill(spare, -1).int(),
            ranges=ranges[None, None].expand(*q.shape[:2], -1, -1, -1).int(),
            queries=site.queries,
            keys=site.keys,
        )

    def _share(self, count: int, there: int, site: Site) -> Share:
        """How a query that may read `count` of `there` keys spends them."""
        hidden = site.far[0].first + site.far[0].count if site.far else 0
        sinks = min(self.sink_tokens, count // 4)
        window = min(self.window_tokens, max(1, count // 2), there - hidden)
        return Share(sinks, window, count - sinks - window)

    def _near(
        self, q: Float[Tensor, "b h q d"], keys: Tensor, sinks: Tensor, window: Tensor, site: Site
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "b h q n"]]:
        """Places among all stored keys of those on the device, and the products of those that are to be searched."""
        place = torch.arange(keys.shape[2], device=q.device)
        if site.far:
            place = torch.where(place >= site.far[0].first, place + site.far[0].count, place)
        end = torch.arange(site.offset + 1, site.keys + 1, device=q.device)[:, None]
        asked = (place >= sinks) & (place < end - window)
        wide = torch.promote_types(q.dtype, torch.float32)
        score = q.unflatten(1, (site.kv_heads, -1)).to(wide) @ keys[:, :, None].to(wide).mT
        return place, score.flatten(1, 2).masked_fill(~asked, -torch.inf)

    def _far(
        self, q: Float[Tensor, "b h q d"], wanted: Sequence[int], site: Site
    ) -> tuple[Int[Tensor, "b h q k"], Float[Tensor, "b h q k"]]:
        """What searches of so many keys for each query find in host memory: places among all stored keys, products."""
        wide = torch.promote_types(q.dtype, torch.float32)
        most = min(max(wanted), site.far[0].count) if site.far else 0
        index = torch.full((*q.shape[:3], most), -1, device=q.device)
        score = torch.full((*q.shape[:3], most), -torch.inf, dtype=wide, device=q.device)
        for row, far in enumerate(site.far):
            asking = q[row].unflatten(0, (site.kv_heads, -1))
            for at, count in _alike(wanted):
                found = far.index.search(asking[:, :, at].flatten(1, 2), count)
                shape = (site.heads, at.stop - at.start, -1)
                places, products = (x.reshape(shape) for x in (found.index, found.score))
                index[row, :, at, : places.shape[-1]] = torch.where(places >= 0, places + far.first, -1).long()
                score[row, :, at, : places.shape[-1]] = products
                site.searched(found.visited, far.count * site.heads * shape[1])
        return index, score


def _alike(wanted: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Runs of queries that want the same number of keys, if any: what one finds must not depend on another's number."""
    at = 0
    for count, run in groupby(wanted):
        length = len(list(run))
        if count:
            yield slice(at, at + length), count
        at += length
