"""SnapKV: the last tokens of the prompt vote for the keys that are remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
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
        usual=True,
        budget="keys per head that remain of the prompt, the window included",
        needs=("queries",),
        departures=(
            "Query heads of one key/value head agree by mean or max, and one copy is stored. The authors repeat the"
            " keys first and store a copy per query head, which costs the memory that grouped heads save; that"
            " 'repeat' cannot be stored per key/value head.",
            "Votes are summed in float32; the authors cast to the model's precision first, where ties are common.",
            "The capacity follows from the budget and may be smaller than the window: then the most recent keys stay.",
            "A prompt exactly as long as the capacity is left as it is; the authors permute its rows.",
            "kvpress' SnapKVPress has a window of 64 and a mean over 5 keys, unless asked otherwise.",
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
        ops.check_window("snapkv", self.window_tokens, self.pool_tokens)

    @property
    def observe_tokens(self) -> int:
        return self.window_tokens

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        return ops.votes_of(seen, site, pool_tokens=self.pool_tokens, pooling=self.pooling, group=self.group)
