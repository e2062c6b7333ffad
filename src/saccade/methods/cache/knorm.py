"""L2 norm: keys of low norm draw the attention, so the keys of high norm are forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.method import Cache
from saccade.core.site import Seen, Site


@dataclass(frozen=True)
class KNorm(Cache):
    """Keep the prompt keys of lowest L2 norm.

    Keys that many queries attend to have a small norm in most heads of most layers, so  s_j = -||k_j||_2  ranks keys
    without looking at one query. The first layers are the exception; `dense_layers` of them can be left whole.

    dense_layers: first layers that keep everything. The others pay for it, so that the whole cache fits the budget

    Raises:
        BadBudget: at the end of the prompt, a budget in tokens or bytes that the dense layers alone exceed.
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
        usual=True,
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
        return site.budget.unpaid(site.layers, self.dense_layers)

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        return -seen.keys.float().norm(dim=-1)

    def allocate(self, scores: Float[Tensor, "b g k"], budget: Budget, site: Site) -> Int[Tensor, "b g"]:
        b, g, k = scores.shape
        kept = budget.layer_tokens(site.seen, site.layer, site.layers, self.dense_layers, site.bytes_per_token)
        return torch.full((b, g), min(k, kept), dtype=torch.long)
