"""Attention sinks: the first tokens and the most recent ones, nothing in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.method import Cache
from saccade.core.selection import Spans
from saccade.core.site import Site


@dataclass(frozen=True)
class Streaming(Cache):
    """Remember the first `sink_tokens` tokens and a window of recent ones; what leaves the window is gone.

    Softmax must put its weight somewhere, and models learn to put it on the first tokens: a window alone collapses.
    Query t sees key j  iff  j < s  or  t - j <= w,  where s + w is the budget. The prompt is computed under the same
    rule, so a cache of s + w keys is all that is ever held.

    sink_tokens: first tokens that stay; fewer where the budget is smaller

    Source: arXiv 2309.17453, section 3; mit-han-lab/streaming-llm.
    """

    rolling: ClassVar[bool] = True
    foretold: ClassVar[bool] = True
    by_position = True
    card = Card(
        name="streaming",
        title="Efficient Streaming Language Models with Attention Sinks",
        family="cache",
        paper="arXiv:2309.17453",
        year=2023,
        authors="Xiao, Tian, Chen, Han, Lewis",
        official="mit-han-lab/streaming-llm",
        licence_of_official="MIT",
        summary="The first few tokens and the most recent ones stay; nothing in between.",
        equation="query t sees key j iff j < s or t - j <= w",
        budget="keys per head that are held, sinks and window; constant in tokens, a fraction grows with the text",
        baseline=True,
        departures=(
            "Keys keep their true positions. The authors store them before the rotary embedding and number them anew"
            " inside the cache, so that a text may run past the trained context; here it ends there.",
            "The query's own token comes on top of the budget, so that a budget of one key still has a sink.",
            "The prompt is computed under the rule; kvpress' StreamingLLMPress computes it densely and cuts it then.",
        ),
        lacks={
            "chunks": "a fraction is taken of the tokens so far, and a first chunk does not know how many come unless"
            " it is told, as generate and serve do; with a budget in tokens, chunks, steps and one pass agree exactly",
        },
    )

    sink_tokens: int = 4

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "evict")

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Spans:
        held = site.budget.tokens(site.whole, site.bytes_per_token)
        sinks = min(self.sink_tokens, held)
        one = torch.ones(1, dtype=torch.long, device=q.device)
        return Spans(sinks=sinks * one, window=(held - sinks + 1) * one, queries=site.queries, keys=site.keys)

    def visible(
        self, q_position: Int[Tensor, "r q"], k_position: Int[Tensor, "r k"], head: Int[Tensor, " r"], site: Site
    ) -> Bool[Tensor, "r q k"]:
        end = q_position.clamp(min=site.whole) if site.stage == "prefill" or site.coming else q_position
        held = _held(site.budget, end, site.bytes_per_token)  # a prompt is one: its queries hold as much
        sinks = held.clamp(max=self.sink_tokens)
        behind = q_position[..., None] - k_position[:, None]
        return (k_position[:, None] < sinks[..., None]) | (behind <= (held - sinks)[..., None])

    def reach(self, queries: Sequence[int], site: Site) -> list[list[tuple[int, int]]]:
        held = [site.budget.tokens(n, site.bytes_per_token) for n in queries]
        return [[(min(n, self.sink_tokens), n - min(n, self.sink_tokens))] * site.kv_heads for n in held]


def _held(budget: Budget, position: Int[Tensor, "r q"], bytes_per_token: int) -> Int[Tensor, "r q"]:
    """Keys that may be held when the token at `position` comes."""
    each, place = position.unique(return_inverse=True)
    held = [budget.tokens(int(n), bytes_per_token) for n in each]
    return torch.tensor(held, device=position.device)[place]
