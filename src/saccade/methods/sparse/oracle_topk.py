"""Oracle top-k: every query reads exactly the keys it attends to most. The best that selection can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.card import Card
from saccade.core.method import Sparse
from saccade.core.selection import Gather, Selection, causal_mask, dense
from saccade.core.site import Site

_PAIRS = 2**24  # scored at once: 64 MiB in float32


@dataclass(frozen=True)
class OracleTopk(Sparse):
    """Score all keys, then use only the best: the most attention mass that so many keys per query can hold.

    Row t reads  top_k { q_t . k_j : j <= t },  the same k in every row of a prefill, a share of the keys in decoding.
    It saves nothing, since choosing costs as much as attending; it bounds from above what any selection with as many
    keys per row keeps. Rows are scored a chunk at a time, so that no n x n map is held.
    """

    card = Card(
        name="oracle-topk",
        title="Oracle top-k",
        family="sparse",
        paper="",
        year=2017,
        summary="Each query reads exactly the keys it attends to most: the bound of every selection, and no faster.",
        equation="top_k { q_t . k_j : j <= t }",
        budget="keys per query row: of the causal pairs in the prefill, of the stored keys in decoding",
        baseline=True,
        lacks={"chunks": "keys per row follow from the prompt's length, which an early chunk does not know"},
    )

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "decode")

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        counts = self._counts(site)
        if min(counts) >= site.keys:
            return dense(site.queries, site.keys)
        step = max(1, _PAIRS // (q.shape[0] * q.shape[1] * site.keys))
        index = torch.full((*q.shape[:3], max(counts)), -1, dtype=torch.int32, device=q.device)
        for first in range(0, site.queries, step):
            last = min(first + step, site.queries)
            keys = k[:, :, : site.offset + last]
            best = _best(q[:, :, first:last], keys, counts[first:last])
            index[:, :, first:last, : best.shape[-1]] = best
        return Gather(index=index, queries=site.queries, keys=site.keys)

    def _counts(self, site: Site) -> list[int]:
        """Keys of each row."""
        if site.stage == "prefill":
            return [site.budget.row_tokens(site.keys)] * site.queries
        return [site.budget.tokens(site.offset + i + 1) for i in range(site.queries)]


def _best(
    q: Float[Tensor, "b h r d"], k: Float[Tensor, "b g k d"], counts: list[int]
) -> Int[Tensor, "b h r l"]:
    """The `counts` keys of largest logit of each row, the last rows of a causal pass; -1 where there are fewer."""
    logits = torch.einsum("bgsrd,bgkd->bgsrk", q.float().unflatten(1, (k.shape[1], -1)), k.float()).flatten(1, 2)
    logits = logits.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -torch.inf)
    value, index = logits.topk(min(max(counts), k.shape[2]), -1)
    rank = torch.arange(index.shape[-1], device=q.device)
    use = (value != -torch.inf) & (rank < torch.tensor(counts, device=q.device)[:, None])
    return torch.where(use, index, -1).int()
