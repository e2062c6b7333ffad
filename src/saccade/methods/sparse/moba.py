"""MoBA: every query picks the key blocks whose mean it matches best, and its own; the gate has no weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Buckets, Selection, Together, dense
from saccade.core.site import Site


@dataclass(frozen=True)
class Moba(Sparse):
    """Route every query, as to experts, to k blocks of keys: its own, causally, and the k - 1 earlier of largest gate.

    s_ti = q_t . mean(K_i);  query t sees block i  iff  i is its own or s_ti is among the k - 1 largest of whole earlier
    blocks, each query by itself. Queries that picked a block attend to it together; the parts are one softmax.
    The gate has no weights: a model trained so makes its keys' means tell. Attached to one that was not, it is no
    drop-in. While decoding attention is dense, as the authors' is; in a net that is trained with it, tokens that follow
    one by one pick blocks too.
    The budget pays for k blocks in every row.

    top_blocks: k, the own block among them; finer blocks where it is larger, fewer where the budget is fewer keys

    Raises:
        BadOption: not even the own block.
    Source: arXiv 2502.13189, section 2, algorithm 1; MoonshotAI/MoBA, moba_naive.py and moba_efficient.py.
    """

    card = Card(
        name="moba",
        title="MoBA: Mixture of Block Attention for Long-Context LLMs",
        family="sparse",
        paper="arXiv:2502.13189",
        year=2025,
        authors="Lu, Jiang, Liu, Du, Jiang, Hong, Liu, He, Yuan, Wang, et al.",
        official="MoonshotAI/MoBA",
        licence_of_official="MIT",
        summary="Each query attends to its own block of keys and to the earlier ones whose mean key it matches best.",
        equation="top_(k-1) { q_t . mean(K_i) : i before the own block }, and the own block up to t",
        budget="keys a row of the prefill reads, at most: k blocks; 1 is dense, also when no budget is given",
        departures=(
            "Blocks follow from the budget, a k-th of the keys that a row may read; the authors fix 512 tokens and k ="
            " 3 at 8k, 4,096 and k = 12 at 1M.",
            "What is left of the own block is not given to others, so that about half a block of each row's budget is"
            " not spent; the authors' is not either.",
            "The last layers, which the authors keep full when fine-tuning, are sparse here.",
            "Gates are in float32 whatever the model's precision.",
        ),
        lacks={
            "chunks": "a fraction is taken of the tokens so far, and a first chunk does not know how many come; with a"
            " budget in tokens, chunks and one pass agree",
        },
    )

    top_blocks: int = 3

    def __post_init__(self):
        super().__post_init__()
        if self.top_blocks < 1:
            raise BadOption("moba.top_blocks=0", "a query sees its own block", "Give 1, or leave it away for 3.")

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        row = site.budget.row_tokens(site.keys)
        if row >= site.keys:
            return dense(site.queries, site.keys)
        top = min(self.top_blocks, row)
        block = row // top
        at = torch.arange(site.keys, dtype=torch.int32, device=q.device)[None, None]
        shape = {"queries": site.queries, "keys": site.keys, "k_bucket": at // block, "k_order": at}
        own = at[..., site.offset :] // block
        mine = Buckets(q_bucket=own, q_order=at[..., : site.queries], **shape)
        picked = self._picked(q, k, own[0, 0], top - 1, block)
        others = [Buckets(q_bucket=bucket, causal=False, **shape) for bucket in picked.unbind(-1)]
        parts = (mine, *others)
        return Together(parts=parts, times=(1.0,) * len(parts), queries=site.queries, keys=site.keys)

    @torch.no_grad()
    def _picked(
        self, q: Tensor, k: Tensor, own: Int[Tensor, " q"], count: int, block: int
    ) -> Int[Tensor, "b h q count"]:
        """The `count` earlier blocks of largest gate of each query; -1 where there are fewer."""
        whole = (k.shape[2] - 1) // block
        means = ops.pool_blocks(k[:, :, : whole * block], block)
        gate = (q.unflatten(1, (k.shape[1], -1)).flatten(2, 3).to(means.dtype) @ means.mT).view(*q.shape[:3], whole)
        gate = gate.masked_fill(torch.arange(whole, device=q.device) >= own[:, None], -torch.inf)
        value, index = gate.topk(min(count, whole), -1)
        return torch.where(value > -torch.inf, index, -1).int()
