"""TOVA: after every token the key that it attends to least is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.method import Cache
from saccade.core.site import Seen, Site


@dataclass(frozen=True)
class TOVA(Cache):
    """Keep as many keys as the budget says; whenever there are more, those go that the newest token attends to least.

    A decoder with a cache of k keys is a recurrent network of k states. Token omission via attention drops states
    without a window or first tokens that are spared, by the weights of the last query, averaged over a layer's heads.
    s_j = 1/h sum_heads softmax(q_t K^T / sqrt(d))_j;  the lowest s goes, the newest key like any other. All heads of a
    layer hold the same tokens.

    Source: arXiv 2401.06104, section 4, equation 9; schwartz-lab-NLP/TOVA, tova_cache.py.
    """

    weighing: ClassVar[bool] = True
    card = Card(
        name="tova",
        title="Transformers are Multi-State RNNs",
        family="cache",
        paper="arXiv:2401.06104",
        year=2024,
        authors="Oren, Hassid, Yarden, Adi, Schwartz",
        official="schwartz-lab-NLP/TOVA",
        licence_of_official="MIT",
        summary="After every token the key that it attends to least, on average over heads, is forgotten.",
        equation="drop argmin_j 1/h sum_heads softmax(q_t K^T / sqrt(d))_j",
        budget="keys per head that are held after every token; constant in tokens, a fraction grows with the text",
        needs=("queries",),
        departures=(
            "The prompt is computed densely and cut at its end by the weights of its last token, as in the authors'"
            " code; the paper's definition drops a key after each of its tokens.",
            "Keys keep their true positions; the authors' code can also number them anew, to run past the trained"
            " context.",
            "A token after the prompt sees the keys held and itself: the budget holds between tokens.",
            "kvpress' TOVAPress never drops the newest key of a prompt; here it goes like any other, as in the paper.",
        ),
        lacks={
            "chunks": "the last prompt token decides what goes: tokens read later find less than one pass over"
            " everything would; a prompt given in chunks is cut at its end and agrees",
            "cache-ops": "tokens whose weights have decided what went cannot be taken back; it is refused. Beams and"
            " batch selection work",
        },
    )

    @property
    def observe_tokens(self) -> int:
        return 1

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        assert seen.queries is not None, "the card asks for queries"
        weights = ops.column_scores(seen.queries, seen.keys, scale=site.scale, softcap=site.softcap)
        return site.shard.gather(weights, 1).mean(1, keepdim=True).expand(-1, site.kv_heads, -1)
