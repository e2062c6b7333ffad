"""SnapKV: the last tokens of the prompt vote for the keys that are remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.site import Seen, Site


@dataclass(frozen=True)
class SnapKV(Cache):
    """Keep the prompt keys that the last prompt tokens vote for.

    Votes are the attention of the last `window_tokens` queries, summed over rows and pooled along the keys so that
    neighbours survive together:  s = pool(sum_w softmax(q_w K^T / sqrt(d))).  The best s of each head are kept, and the
    window itself. The prompt's own attention is untouched; tokens generated later are all kept.

    window_tokens: queries that vote, and keys that always stay
    pool_tokens: width of the pooling, odd; 1 turns it off
    group: how the query heads that share a key/value head agree

    Raises:
        BadOption: no voting query, or an even pooling width.
    Source: arXiv 2404.14469, section 3 and listing 1; FasterDecoding/SnapKV, snapkv_utils.py.
    """

    card = Card(
        name="snapkv",
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        family="cache",
        paper="arXiv:2404.14469",
        year=2024,
        authors="Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai, Lewis, Chen",
        official="FasterDecoding/SnapKV",
        licence_of_official="Apache-2.0",
        summary="The last prompt tokens vote for the prompt keys that each head remembers.",
        equation="keep top(pool(sum_w softmax(q_w K^T / sqrt(d)))) and the last w keys",
        budget="keys per head that remain of the prompt, the window included",
        needs=("queries",),
        departures=(
            "Query heads of one key/value head agree by mean or max, and one copy is stored. The authors repeat the"
            " keys first and store a copy per query head, which costs the memory that grouped heads save; that"
            " 'repeat' cannot be stored per key/value head.",
            "Votes are summed in float32; the authors cast to the model's precision first, where ties are common.",
            "The capacity follows from the budget and may be smaller than the window: then the most recent keys stay.",
            "A prompt exactly as long as the capacity is left as it is; the authors permute its rows.",
        ),
        lacks={
            "chunks": "the last prompt tokens vote and what they dismiss is gone: tokens read later find less than one"
            " pass over everything would; a prompt given in chunks is scored at its end and agrees",
        },
    )

    window_tokens: int = 32
    pool_tokens: int = 7
    pooling: Literal["max", "avg"] = "max"
    group: Literal["mean", "max"] = "mean"

    def __post_init__(self):
        super().__post_init__()
        if self.window_tokens < 1:
            raise BadOption("snapkv.window_tokens=0", "no query would vote", "Give at least 1; the authors use 32.")
        if self.pool_tokens % 2 == 0:
            raise BadOption(
                f"snapkv.pool_tokens={self.pool_tokens}",
                "an even pooling width has no middle",
                "Give an odd number; 1 pools nothing.",
            )

    @property
    def observe_tokens(self) -> int:
        return self.window_tokens

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        assert seen.queries is not None, "the card asks for queries"
        window = min(self.window_tokens, seen.queries.shape[2])
        votes = ops.column_scores(seen.queries[:, :, -window:], seen.keys, scale=site.scale, softcap=site.softcap)
        ahead = _pool(votes[..., :-window], self.pool_tokens, self.pooling).unflatten(1, (site.kv_heads, site.group))
        ahead = ahead.mean(2) if self.group == "mean" else ahead.amax(2)
        # within a budget below the window, older window keys rank like any losing key: the most recent ones stay
        recent = min(window, site.budget.tokens(site.seen, site.bytes_per_token))
        sure = torch.arange(window, device=votes.device) >= window - recent
        last = torch.where(sure, torch.inf, -torch.inf).expand(*ahead.shape[:2], window)
        return torch.cat([ahead, last], -1)


def _pool(votes: Float[Tensor, "b h k"], width: int, how: str) -> Float[Tensor, "b h k"]:
    """Pool along the keys. As the authors do, the mean counts the zeros beyond the ends."""
    if votes.shape[-1] == 0:
        return votes
    pool = torch.nn.functional.max_pool1d if how == "max" else torch.nn.functional.avg_pool1d
    return pool(votes, width, stride=1, padding=width // 2)
