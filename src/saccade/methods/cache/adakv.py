"""Ada-KV: the heads of a layer share its budget, and a head whose attention is spread out gets more of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.site import Seen, Site


@dataclass(frozen=True)
class AdaKV(Cache):
    """Keep the best keys of all heads of a layer together, by SnapKV's votes.

    The B g keys of a layer with g heads go to the largest votes wherever they are, T of them to head i. That makes the
    attention that is kept as large as it can be, and with it the bound on the error of the output as small. A share
    alpha is dealt out evenly before, so that no head is starved.
    B_i = (1 - alpha) T_i + alpha B,  rounded down.

    safeguard: alpha, the share of a layer's budget that its heads get in equal parts; 1 is SnapKV
    window_tokens: queries that vote, and keys that always stay
    pool_tokens: width of the pooling of votes, odd; 1 turns it off
    pooling: how neighbours are pooled
    group: how the query heads that share a key/value head agree

    Raises:
        BadOption: a safeguard outside [0, 1], no voting query, or an even pooling width.
    Source: arXiv 2407.11550, section 3, algorithms 1 and 2; FFY0/AdaKV, snapkv_utils.py.
    """

    card = Card(
        name="adakv",
        title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        family="cache",
        paper="arXiv:2407.11550",
        year=2024,
        authors="Feng, Lv, Cao, Xie, Zhou",
        official="FFY0/AdaKV",
        summary="SnapKV's votes, but the heads of a layer share one budget: it goes where the largest votes are.",
        equation="B_i = (1 - alpha) |head i in top(all heads' votes, B g)| + alpha B",
        budget="mean keys per head of each layer that remain of the prompt, the window included",
        needs=("queries",),
        departures=(
            "Heads are key/value heads, whose query heads agree by mean or max; the paper's first version repeats keys"
            " and shares out among query heads. The authors' GQA branch does as we do, by the mean.",
            "Shares are rounded down, so that the budget is never exceeded; the authors round to the nearest.",
            "Equal votes go to the heads in turn, older keys first; a pooled vote is often shared by neighbours.",
            "Votes are taken as they are; the authors' optional 'normalize' and first layers left whole ('skip') are"
            " not part of this.",
            "A budget below the window keeps the most recent keys, evenly. Ada-PyramidKV is not part of this.",
            "kvpress' AdaKVPress sets alpha B keys of each head aside and lets all heads compete for the rest; it does"
            " not mix counts.",
            "Heads of equal length lie together in the cache, without padding, in place of the authors' flattened"
            " layout with a kernel of its own.",
        ),
        lacks={
            "chunks": "the last prompt tokens vote and what they dismiss is gone: tokens read later find less than one"
            " pass over everything would; a prompt given in chunks is scored at its end and agrees",
        },
    )

    safeguard: float = 0.2
    window_tokens: int = 32
    pool_tokens: int = 7
    pooling: Literal["max", "avg"] = "max"
    group: Literal["mean", "max"] = "mean"

    def __post_init__(self):
        super().__post_init__()
        ops.check_window("adakv", self.window_tokens, self.pool_tokens)
        if not 0 <= self.safeguard <= 1:
            found = "it takes a share from 0 to 1"
            raise BadOption(f"adakv.safeguard={self.safeguard}", found, "Leave it away for 0.2.")

    @property
    def observe_tokens(self) -> int:
        return self.window_tokens

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        return ops.votes_of(seen, site, pool_tokens=self.pool_tokens, pooling=self.pooling, group=self.group)

    def allocate(self, scores: Float[Tensor, "b g k"], budget: Budget, site: Site) -> Int[Tensor, "b g"]:
        scores = site.shard.gather(scores, 1)  # all heads compete
        b, g, k = scores.shape
        held = min(k, budget.tokens(site.seen, site.bytes_per_token))
        # by tokens, not finer than float32, so that of equal votes no head takes all; the window's inf are first
        best = scores.float().mT.flatten(1).argsort(dim=-1, descending=True, stable=True)[:, : g * held] % g
        won = torch.zeros(b, g, dtype=torch.long, device=scores.device).scatter_add_(1, best, torch.ones_like(best))
        mixed = (1 - self.safeguard) * won.double() + self.safeguard * held
        return site.shard.mine((mixed + 1e-9).floor().long(), 1)
