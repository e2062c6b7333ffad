"""XAttention: the sum along antidiagonals tells how much of the attention map lies in a block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saccade import ops
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Selection, dense
from saccade.core.site import Site


@dataclass(frozen=True)
class Xattention(Sparse):
    """Score blocks of the attention map by the logits on every S-th antidiagonal; compute those that hold a set share.

    Groups of S queries t and S keys u have one logit,  s_tu = sum_i q_{t, S-1-i} . k_{u, i} / (S sqrt(d)),  which meets
    every column, and with an even S the diagonals at odd distances. softmax_u s, summed over blocks, is how much a
    block holds; each row of blocks takes its largest until they hold tau, after the diagonal and the first block.
    By a budget, tau is as large as the pairs pay for: one number for all rows and heads of a layer, so that those that
    look broadly get more.

    threshold: tau itself; takes no budget
    stride: S, a divisor of block_tokens; the largest common divisor of both where blocks are smaller
    block_tokens: for queries and keys; by a budget a smaller power of two where a row is shorter than four blocks

    Raises:
        BadOption: an empty block, a stride that does not divide it, or a threshold outside 0 to 1.
    Source: arXiv 2503.16428, section 2, algorithm 1; mit-han-lab/x-attention, xattn/src/Xattention.py.
    """

    card = Card(
        name="xattention",
        title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
        family="sparse",
        paper="arXiv:2503.16428",
        year=2025,
        authors="Xu, Xiao, Huang, Guo, Han",
        official="mit-han-lab/x-attention",
        licence_of_official="MIT",
        summary="Sums along antidiagonals score the blocks of a prefill; those that hold a set share are computed.",
        equation="s_tu = sum_i q_{t,S-1-i} . k_{u,i} / (S sqrt(d));  min |B|: sum_B softmax_u s >= tau in each row",
        budget="causal pairs computed in the prefill, by all heads of a layer together; 1 is dense, also when no budget"
        " is given (threshold takes none)",
        departures=(
            "By a budget, the threshold follows from it, in each layer; the authors fix one for all heads (0.8 to"
            " 0.95), or search one for each head offline, which is left out.",
            "The first block and the diagonal are always computed by a threshold, as in the authors' code; by a budget"
            " the first block comes next after all diagonals.",
            "Softmax is in float32 whatever the model's precision, and logits are capped where the model caps them.",
        ),
        lacks={
            "chunks": "blocks of queries are counted from where a forward starts, pairs shared out among those there",
            "causality": "the queries of a block choose together, and rows share the pairs",
        },
    )

    threshold: float | None = None
    stride: int = 8
    block_tokens: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.block_tokens < 1:
            raise BadOption("xattention.block_tokens=0", "it takes at least 1", "Leave it away for the authors' 128.")
        if self.stride < 1 or self.block_tokens % self.stride:
            found = f"it takes a divisor of block_tokens={self.block_tokens}"
            raise BadOption(f"xattention.stride={self.stride}", found, "The authors' are 8 and 16.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            asked = f"xattention.threshold={self.threshold}"
            raise BadOption(asked, "it takes a number from 0 to 1", "The authors' is 0.9.")

    def check(self, site: Site) -> list[str]:
        reasons = super().check(site)
        if self.threshold is not None and site.budget != Budget(1.0):
            ignored = f"would ignore the budget {site.budget}"
            reasons.append(f"threshold={self.threshold} computes as many pairs as it takes, and {ignored}")
        return reasons

    @torch.no_grad()
    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        row, block = site.budget.row_tokens(site.keys), self.block_tokens
        by: dict[str, float] = {"threshold": self.threshold} if self.threshold is not None else {"row_tokens": row}
        if self.threshold is None:
            if row >= site.keys:
                return dense(site.queries, site.keys)
            block = min(block, 1 << max(0, (row // 4).bit_length() - 1))
        stride = math.gcd(self.stride, block)
        logits = {"scale": site.scale, "softcap": site.softcap}
        mass = ops.antidiagonal_mass(q, k, block=block, stride=stride, **logits)
        entry = ops.mass_before(mass, _first(block, site, q.device).expand_as(mass))
        entry[..., 0] = -1
        entry = site.shard.gather(entry, 1)  # heads share their pairs
        return ops.cover_blocks(entry, queries=site.queries, keys=site.keys, block=block, **by).part(site.shard)


def _first(block: int, site: Site, device: torch.device) -> Bool[Tensor, "nqb nkb"]:
    """The first block of keys, and those that a block of queries is itself part of (those behind it hold nothing)."""
    own = torch.arange(site.offset, site.keys, block, device=device) // block
    at = torch.arange(-(-site.keys // block), device=device)
    return (at == 0) | (at >= own[:, None])
