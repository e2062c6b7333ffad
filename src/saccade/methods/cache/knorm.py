"""L2 norm: keys of low norm draw the attention, so the keys of high norm are forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadBudget
from saccade.core.method import Cache
from saccade.core.site import Seen, Site


@dataclass(frozen=True)
class KNorm(Cache):
    """Keep the prompt keys of lowest L2 norm.

    Keys that many queries attend to have a small norm in most heads of most layers, so  s_j = -||k_j||_2  ranks keys
    without looking at one query. The first layers are the exception; `dense_layers` of them can be left whole.

    dense_layers: first layers that keep everything. The others pay for it, so that the whole cache fits the budget.

    Source: arXiv 2406.11430, section 3; alessiodevoto/l2compress.
    """

    card = Card(
        name="knorm",
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        family="cache",
        paper="arXiv:2406.11430",
        year=2024,
        authors="Devoto, Zhao, Scardapane, Minervini",
        official="alessiodevoto/l2compress",
        summary="Each head remembers the prompt keys of lowest L2 norm; no query is consulted.",
        equation="keep top(-||k_j||_2)",
        budget="keys per head that remain of the prompt; with dense_layers, their mean over the layers",
        departures=(
            "Compressed once, at the end of the prompt; the authors also compress while generating.",
            "dense_layers is 0 unless asked for. The authors leave layers 0 and 1 whole, outside the count; here what"
            " they hold is part of the budget.",
            "The norm is taken after the rotary embedding, which turns keys and leaves their length.",
        ),
        lacks={"chunks": "a prompt continued after its end finds the keys of high norm already forgotten"},
    )

    dense_layers: int = 0

    def check(self, site: Site) -> list[str]:
        share = site.budget.fraction(max(site.seen, 1), site.bytes_per_token) if site.budget.unit == "fraction" else 1.0
        if self.dense_layers == 0 or share == 1 or share * site.layers > self.dense_layers:
            return []
        return [
            f"dense_layers={self.dense_layers} of {site.layers} layers alone exceed the budget {site.budget}; "
            f"give a larger budget or fewer dense layers"
        ]

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        return -seen.keys.float().norm(dim=-1)

    def allocate(self, scores: Float[Tensor, "b g k"], budget: Budget, site: Site) -> Int[Tensor, "b g"]:
        b, g, k = scores.shape
        return torch.full((b, g), min(k, self._keys(budget, site)), dtype=torch.long)

    def _keys(self, budget: Budget, site: Site) -> int:
        """Keys per head in this layer, so that all layers together hold what the budget allows."""
        even = budget.tokens(site.seen, site.bytes_per_token)
        if self.dense_layers == 0 or even == site.seen:
            return even
        if site.layer < self.dense_layers:
            return site.seen
        left = even * site.layers - site.seen * self.dense_layers
        if left < site.layers - self.dense_layers:
            raise BadBudget(
                f"knorm with budget={budget} and dense_layers={self.dense_layers}",
                f"{self.dense_layers} whole layers of {site.seen} tokens leave less than a key for each other layer",
                "Give a larger budget or fewer dense layers.",
            )
        return left // (site.layers - self.dense_layers)
