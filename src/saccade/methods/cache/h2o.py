"""H2O: keys that drew most attention so far stay, beside the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.site import Seen, Site


@dataclass(frozen=True)
class H2O(Cache):
    """Keep the heavy hitters, the keys of largest attention summed over all queries, and a window of recent keys.

    Attention sums follow a power law: a few keys draw most of it. Each head keeps a sum per key,
    s_j = sum_(i <= t) softmax(q_i K^T / sqrt(d))_j,  over the queries of prompt and generation since the key came. Of
    the budget one part holds the recent keys, the other those of largest s; a key that goes takes its sum along.

    heavy_share: of the budget, for heavy hitters; the rest is for recent keys, at least one

    Raises:
        BadOption: a share outside [0, 1].
    Source: arXiv 2306.14048, section 4, algorithm 1; FMInference/H2O, h2o_hf/utils_real_drop/modify_llama.py.
    """

    weighing: ClassVar[bool] = True
    tallies: ClassVar[bool] = True
    card = Card(
        name="h2o",
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        family="cache",
        paper="arXiv:2306.14048",
        year=2023,
        authors="Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang, Chen",
        official="FMInference/H2O",
        summary="The keys that drew most attention so far stay, beside the most recent ones.",
        equation="keep top(sum_(i <= t) softmax(q_i K^T / sqrt(d))) and the last keys",
        budget="keys per head that are held after every token; constant in tokens, a fraction grows with the text",
        departures=(
            "The prompt is computed densely, its column sums in pieces; the keys to keep are chosen at its end. The"
            " paper's algorithm drops one key after each token of the prompt, its code does as we do.",
            "Sums of the query heads of one key/value head are added. The paper has one head for each.",
            "Sums are kept in float32 beside the keys, four bytes for each, and counted as held.",
            "A token after the prompt sees the keys held and itself: the budget holds between tokens.",
            "Keys keep their true positions; the authors' streaming code numbers them anew inside the cache.",
            "kvpress' ObservedAttentionPress divides each sum by the number of queries that saw the key, and keeps no"
            " recent keys for being recent; the paper does neither, nor do we.",
        ),
        lacks={
            "chunks": "what is dropped at the end of the prompt is not found by tokens read later, as it is in one pass"
            " over everything; a prompt given in chunks is cut at its end and agrees",
            "cache-ops": "tokens whose weights were added to the sums cannot be taken back; it is refused. Beams and"
            " batch selection work",
        },
    )

    heavy_share: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.heavy_share <= 1:
            raise BadOption(f"h2o.heavy_share={self.heavy_share}", "it takes a share from 0 to 1", "Give a half.")

    def tally(self, q: Float[Tensor, "r s q d"], k: Float[Tensor, "r k d"], site: Site) -> Float[Tensor, "r k"]:
        return ops.column_scores(q, k[:, None], scale=site.scale, softcap=site.softcap).sum(1)

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        assert seen.tally is not None, "it keeps one"
        held = site.budget.tokens(site.seen, site.bytes_per_token)
        recent = max(1, held - int(held * self.heavy_share))
        place = torch.arange(site.keys, device=seen.tally.device)
        return seen.tally.masked_fill(place >= site.keys - recent, torch.inf)
