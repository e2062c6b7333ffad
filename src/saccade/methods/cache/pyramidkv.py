"""PyramidKV: low layers, whose attention is spread out, remember more keys than high ones."""

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
class PyramidKV(Cache):
    """Keep the prompt keys that the last prompt tokens vote for, fewer from layer to layer.

    Attention looks everywhere in the first layers and gathers on few keys in the last. Beside the window, layer l of m
    keeps as many keys as an arithmetic sequence says, whose mean is the budget B:
    k_l = k_0 - (k_0 - k_(m-1)) l / (m - 1),  k_(m-1) = B / beta,  k_0 = 2 B - k_(m-1).  Which keys, SnapKV's votes say.

    beta: the budget over what the last layer keeps of it: the larger, the steeper; 1 is SnapKV
    window_tokens: queries that vote, and keys that always stay
    pool_tokens: width of the pooling of votes, odd; 1 turns it off
    pooling: how neighbours are pooled
    group: how the query heads that share a key/value head agree

    Raises:
        BadOption: a beta below 1, no voting query, or an even pooling width.
    Source: arXiv 2406.02069, section 4; Zefan-Cai/KVCache-Factory, pyramidkv_utils.py.
    """

    card = Card(
        name="pyramidkv",
        title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        family="cache",
        paper="arXiv:2406.02069",
        year=2024,
        authors="Cai, Zhang, Gao, Liu, Li, Liu, Lu, Xiong, Dong, Hu, Xiao",
        official="Zefan-Cai/KVCache-Factory",
        licence_of_official="MIT",
        summary="SnapKV's votes, with a budget that falls from layer to layer like a pyramid.",
        equation="k_l = k_0 - (k_0 - k_(m-1)) l / (m - 1),  k_(m-1) = B / beta,  k_0 = 2 B - k_(m-1)",
        budget="mean keys per head over the layers that remain of the prompt, the window included",
        needs=("queries",),
        departures=(
            "beta is as in the authors' code: the budget over what the last layer keeps, both without the window. The"
            " paper says the same of the whole cache: the last layer gets it over beta m.",
            "Where the first layer would keep more than the prompt, it keeps the prompt, and the last what is then"
            " left of the mean; so does the authors' code, save for prompts below twice the budget: these it cuts"
            " evenly.",
            "The slope is not rounded to whole keys before it is taken; each layer's count is, downwards.",
            "The window is inside the budget; a budget below it keeps as many recent keys in all layers.",
            "Query heads of one key/value head agree by mean or max, and one copy is stored, as in our SnapKV.",
            "kvpress' PyramidKVPress counts the window inside the sequence, and shares out evenly where the last layer"
            " would keep less than the window.",
        ),
        lacks={
            "chunks": "the last prompt tokens vote and what they dismiss is gone: tokens read later find less than one"
            " pass over everything would; a prompt given in chunks is scored at its end and agrees",
        },
    )

    beta: float = 20.0
    window_tokens: int = 8
    pool_tokens: int = 7
    pooling: Literal["max", "avg"] = "max"
    group: Literal["mean", "max"] = "mean"

    def __post_init__(self):
        super().__post_init__()
        ops.check_window("pyramidkv", self.window_tokens, self.pool_tokens)
        if not self.beta >= 1:
            raise BadOption(f"pyramidkv.beta={self.beta}", "the last layer would keep most", "Give 1 or more.")

    @property
    def observe_tokens(self) -> int:
        return self.window_tokens

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        return ops.votes_of(seen, site, pool_tokens=self.pool_tokens, pooling=self.pooling, group=self.group)

    def allocate(self, scores: Float[Tensor, "b g k"], budget: Budget, site: Site) -> Int[Tensor, "b g"]:
        b, g, k = scores.shape
        held = min(k, budget.tokens(site.seen, site.bytes_per_token))
        window = min(self.window_tokens, held)
        return torch.full((b, g), window + self._steps(held - window, k - window, site), dtype=torch.long)

    def _steps(self, mean: int, most: int, site: Site) -> int:
        """Keys beside the window in this layer, if the layers keep `mean` on average and may keep `most`."""
        if site.layers == 1:
            return mean
        low = max(mean / self.beta, 2.0 * mean - most)
        fall = 2 * (mean - low) / (site.layers - 1)
        return int(2 * mean - low - fall * site.layer + 1e-9)
