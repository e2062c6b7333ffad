"""Quest: the bounds of a page of keys say how large a logit in it can be, the pages with the largest are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Decode
from saccade.core.selection import Gather, Selection, column, dense
from saccade.core.site import Site

Bounds = tuple[Float[Tensor, "b g p d"], Float[Tensor, "b g p d"]]


@dataclass(frozen=True)
class Quest(Decode):
    """Each query reads the pages of keys that could hold the largest logits.

    Stored keys lie in pages of S. Of every page the least and largest value of each channel, m and M, are kept, so
    that no key k in it has a larger logit than  u = sum_c max(q_c m_c, q_c M_c) >= q . k.  The newest page, which may
    not be full, is always read, and as many of the others, by u, as the budget pays for; attention over them is exact.
    Which tokens matter changes with the query, so nothing is dropped.

    page_tokens: S, stored keys of a page
    dense_layers: first layers that read everything. The others pay for it, so that all reads fit the budget
    group: "max": the query heads of a key/value head read the same pages, by the largest u of theirs; "per-head": each
        query head has pages of its own

    Raises:
        BadOption: pages of no key.
        BadBudget: while reading, a budget in tokens or bytes that the dense layers alone exceed.
    Source: arXiv 2406.10774, section 3.3 and algorithm 1; mit-han-lab/Quest, quest_attention.py and QuestAttention.py.
    """

    dated: ClassVar[bool] = True
    card = Card(
        name="quest",
        title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        family="decode",
        paper="arXiv:2406.10774",
        year=2024,
        authors="Tang, Zhao, Zhu, Xiao, Kasikci, Han",
        official="mit-han-lab/Quest",
        summary="Bounds of every page of keys say which pages a new query reads; everything stays stored.",
        equation="u_page = sum_c max(q_c min_c, q_c max_c);  o = softmax(q K_P^T / sqrt(d)) V_P,  P = top(u)",
        budget="stored keys that each new query reads, mean over the layers",
        departures=(
            "The query heads of a key/value head share their pages, by the largest bound, so that each page is read"
            " once; the paper's models have a key/value head for every query head. group=per-head chooses for each.",
            "Layers 0 and 1 read everything, as in the paper; here that is part of the budget. The paper fixes a number"
            " of tokens for the other layers and does not count the two.",
            "The budget is in keys: the newest page counts with the keys it has, and what is left below a page stays"
            " unread. A budget below the newest page reads its newest keys. The authors' accuracy code reads at least"
            " three pages.",
            "The newest page is always read, as in the authors' fast path; in their accuracy code it competes.",
            "Reading the bounds is not counted; they are as many bytes as one key in S / 2.",
        ),
        lacks={
            "gqa": "the query heads of a key/value head choose together; written out, each chooses for itself",
            "backward": "it reads a cache, which training does not have",
        },
    )

    page_tokens: int = 16
    dense_layers: int = 2
    group: Literal["max", "per-head"] = "max"

    def __post_init__(self):
        super().__post_init__()
        if self.page_tokens < 1:
            raise BadOption("quest.page_tokens=0", "a page has one key or more", "Give at least 1; the paper has 16.")

    @property
    def replays(self) -> bool:
        return True

    def check(self, site: Site) -> list[str]:
        return site.budget.unpaid(site.layers, self.dense_layers)

    def select(self, q: Float[Tensor, "b h q d"], stored: Mapping[str, Tensor], site: Site) -> Selection:
        seen = list(range(site.offset + 1, site.keys + 1))
        counts = self._counts(seen, site)
        if counts == seen:
            if site.state:  # of tokens that were taken back nothing may stay, though nobody asks for bounds now
                self._bounds(stored, site)
            return dense(site.queries, site.keys)
        newest = [(n - 1) // self.page_tokens for n in seen]
        start = [max(page * self.page_tokens, n - count) for page, n, count in zip(newest, seen, counts)]
        room = [max(0, count - (n - first)) // self.page_tokens for count, n, first in zip(counts, seen, start)]
        wide = max(n - first for n, first in zip(seen, start))
        tail = column(start, q.device) + torch.arange(wide, device=q.device)
        tail = tail.masked_fill(tail >= column(seen, q.device), -1)
        index = tail.expand(q.shape[0], site.heads, -1, -1)
        pages = self._pages(q, self._bounds(stored, site), newest, room)
        if pages.shape[-1]:
            keys = pages[..., None] * self.page_tokens + torch.arange(self.page_tokens, device=q.device)
            keys = keys.masked_fill((pages < 0)[..., None], -1).flatten(-2)
            index = torch.cat([keys.repeat_interleave(site.heads // keys.shape[1], 1), index], -1)
        shared = site.group if self.group == "max" else 1
        return Gather(index=index.int(), queries=site.queries, keys=site.keys, shared=shared)

    def refresh(self, stored: Mapping[str, Tensor], site: Site) -> None:
        self._bounds(stored, site)

    def _pages(
        self, q: Float[Tensor, "b h q d"], bounds: Bounds, newest: list[int], room: list[int]
    ) -> Int[Tensor, "b h|g q m"]:
        """The best pages of each query among those before its newest, as many as it has room for; -1: none."""
        heads = bounds[0].shape[1] if self.group == "max" else q.shape[1]
        out = torch.full((q.shape[0], heads, q.shape[2], max(room)), -1, dtype=torch.long, device=q.device)
        if not max(room):
            return out
        scores = ops.page_scores(q, *bounds, by_group=self.group == "max")
        whole = column(newest, q.device)
        scores = scores.masked_fill(torch.arange(scores.shape[-1], device=q.device) >= whole, -torch.inf)
        if len(set(room)) == 1:
            return _wide(ops.topk(scores, room[0]).long(), room[0])
        for count in set(room) - {0}:
            rows = torch.tensor([i for i, n in enumerate(room) if n == count], device=q.device)
            out[:, :, rows, :count] = ops.topk(scores[:, :, rows], count).long()
        return out

    def _bounds(self, stored: Mapping[str, Tensor], site: Site) -> Bounds:
        """Of all full pages. What was there before these queries is remembered; only what came since is looked at."""
        keys, full = stored["keys"], site.keys // self.page_tokens
        old = self._remembered(stored["positions"], site)
        fresh = keys[:, :, old * self.page_tokens : full * self.page_tokens]
        if fresh.shape[2]:
            new = dict(zip(("low", "high"), ops.page_bounds(fresh, self.page_tokens)))
            last = stored["positions"][:, :, : full * self.page_tokens]
            new["last"] = last[:, :, (old + 1) * self.page_tokens - 1 :: self.page_tokens]
            both = {name: [site.state[name][:, :, :old]] if old else [] for name in new}
            site.state.update({name: torch.cat([*both[name], x], 2) for name, x in new.items()})
        elif site.state:
            site.state.update({name: x[:, :, :old] for name, x in site.state.items()})
        else:
            return keys[:, :, :0], keys[:, :, :0]
        return site.state["low"], site.state["high"]

    def _remembered(self, positions: Int[Tensor, "b g k"], site: Site) -> int:
        """How many first pages are still as they were: tokens may have been taken back, and an eviction that goes on
        may have dropped keys, which shows in where a page ends."""
        if "last" not in site.state:
            return 0
        pages = min(site.state["last"].shape[2], site.offset // self.page_tokens)
        if site.settled:
            return pages
        ends = positions[:, :, self.page_tokens - 1 :: self.page_tokens][:, :, :pages]
        same = (ends == site.state["last"][:, :, :pages]).all(0).all(0)
        return int(same.int().cumprod(0).sum())

    def _counts(self, seen: list[int], site: Site) -> list[int]:
        """Keys that each query reads: its own budget, as if it came alone."""
        spread = (site.layer, site.layers, self.dense_layers, site.bytes_per_token)
        return [site.budget.layer_tokens(n, *spread) for n in seen]


def _wide(pages: Int[Tensor, "b h q m"], count: int) -> Int[Tensor, "b h q n"]:
    """With -1 where there are fewer pages than asked for."""
    return torch.nn.functional.pad(pages, (0, count - pages.shape[-1]), value=-1)
