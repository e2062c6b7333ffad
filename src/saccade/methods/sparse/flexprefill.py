"""FlexPrefill: the last queries tell which of two shapes a head takes, and how many blocks hold a set share of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from saccade import ops
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Selection, dense
from saccade.core.site import Site


@dataclass(frozen=True)
class Flexprefill(Sparse):
    """Ask whether pooled keys would have foretold what the last queries look at; choose the head's shape by that.

    Of the last b queries, a = softmax(mean Q . mean K / sqrt(d)) is the guess and p = sum_rows sum_block P / b the
    truth, by blocks. Where D = sqrt(JS(a, p)) < tau, the head takes the blocks of the whole pooled map that hold gamma
    of it ("query-aware"); else the block columns, and the block diagonals, that hold gamma of P.
    By a budget, gamma is as large as the pairs pay for: one number for all heads of a layer, so that heads that look
    broadly get more. The diagonal is always computed, and the first block of keys comes next.

    gamma: the share itself; takes no budget
    tau: largest distance D of a query-aware head, from 0 (none is) to 1 (all are)
    block_tokens: b, for queries and keys; by a budget a smaller power of two where a row is shorter than four blocks
    least_tokens: of columns and of diagonals, so many tokens' worth of each come first in every head, in whole blocks
        and one at least; by a budget at most an eighth of a row of each

    Raises:
        BadOption: an empty block, or a gamma or tau outside 0 to 1.
    Source: arXiv 2502.20766, algorithms 1 to 4; ByteDance-Seed/FlexPrefill, flex_prefill_attention.py.
    """

    card = Card(
        name="flexprefill",
        title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
        family="sparse",
        paper="arXiv:2502.20766",
        year=2025,
        authors="Lai, Lu, Luo, Ma, Zhou",
        official="ByteDance-Seed/FlexPrefill",
        licence_of_official="Apache-2.0",
        summary="Each head is lines or free blocks, as a check on the last queries says, and as many as hold a share.",
        equation="min |S|: mass(S) >= gamma;  S of pooled Q K^T if sqrt(JS(pooled, true)) < tau, else of lines of P",
        budget="causal pairs computed in the prefill, by all heads of a layer together; 1 is dense, also when no budget"
        " is given (gamma takes none)",
        departures=(
            "By a budget, gamma follows from it, in each layer; the authors fix it for all (0.9 or 0.95).",
            "Columns and diagonals are counted in blocks throughout; the authors count tokens against gamma, divide by"
            " 128, and take so many of the best blocks.",
            "Pooled means count the tokens a block has; in the last block of queries so do the authors', in that of"
            " keys they count padding.",
            "Least columns and diagonals are within the budget and shrink with it; the authors' 1024 tokens of each are"
            " beside gamma, and they cap neither.",
            "Logits are capped where the model caps them.",
        ),
        lacks={
            "chunks": "lines and shapes follow from the last queries there are, which differ from chunk to chunk",
            "causality": "the last queries of the prompt decide where earlier ones look",
        },
    )

    gamma: float | None = None
    tau: float = 0.1
    block_tokens: int = 128
    least_tokens: int = 1024

    def __post_init__(self):
        super().__post_init__()
        if self.block_tokens < 1:
            asked = "flexprefill.block_tokens=0"
            raise BadOption(asked, "it takes at least 1", "Leave it away for the authors' value.")
        for name, value, usual in (("gamma", self.gamma, "0.9 or 0.95"), ("tau", self.tau, "0.1")):
            if value is not None and not 0 <= value <= 1:
                asked = f"flexprefill.{name}={value}"
                raise BadOption(asked, "it takes a number from 0 to 1", f"The authors' is {usual}.")

    def check(self, site: Site) -> list[str]:
        reasons = super().check(site)
        if self.gamma is not None and site.budget != Budget(1.0):
            ignored = f"would ignore the budget {site.budget}"
            reasons.append(f"gamma={self.gamma} computes as many pairs as it takes, and {ignored}")
        return reasons

    @torch.no_grad()
    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        row, block, least = site.budget.row_tokens(site.keys), self.block_tokens, self.least_tokens
        by: dict[str, float] = {"threshold": self.gamma} if self.gamma is not None else {"row_tokens": row}
        if self.gamma is None:
            if row >= site.keys:
                return dense(site.queries, site.keys)
            block = min(block, 1 << max(0, (row // 4).bit_length() - 1))
            least = min(least, row // 8)
        columns, diagonals = self._lines(q[:, :, -block:], k, block, site)
        pooled_q, pooled_k = ops.pool_blocks(q, block), ops.pool_blocks(k, block).repeat_interleave(site.group, 1)
        guess = _logits(q[:, :, -block:].float().mean(2, keepdim=True), pooled_k, site).softmax(-1)[:, :, 0]
        free = distance(guess, columns) < self.tau
        entry = self._of_lines(columns, diagonals, -(-least // block), free, block, site)
        freely = torch.minimum(entry, _of_map(pooled_q, pooled_k, block, site))
        entry = torch.where(free[..., None, None], freely, entry)
        entry = site.shard.gather(entry, 1)  # heads share their pairs
        return ops.cover_blocks(entry, queries=site.queries, keys=site.keys, block=block, **by).part(site.shard)

    def _lines(
        self, last: Tensor, k: Tensor, block: int, site: Site
    ) -> tuple[Float[Tensor, "b h nkb"], Float[Tensor, "b h nkb"]]:
        """Mean attention of the last queries to each block of keys, and at each distance in blocks."""
        scores = ops.line_scores(last, k, scale=site.scale, softcap=site.softcap)
        fill = -site.keys % block
        columns, diagonals = (pad(x, (0, fill)).unflatten(-1, (-1, block)).sum(-1) / last.shape[2] for x in scores)
        return columns, diagonals

    def _of_lines(
        self, columns: Tensor, diagonals: Tensor, least: int, free: Bool[Tensor, "b h"], block: int, site: Site
    ) -> Float[Tensor, "b h nqb nkb"]:
        """What is held before each block, if lines are taken in their order; of free heads the least ones only."""
        before = []
        for mass in (columns, diagonals):
            first = torch.zeros_like(mass, dtype=torch.bool)
            first[..., 0] = True
            share = ops.mass_before(mass, first)
            rank = share.argsort(dim=-1, stable=True).argsort(-1)
            share = torch.where(free[..., None], 2.0, share)
            before.append(torch.where(rank < max(1, least), rank / max(1, least) - 1, share))
        rows, keys = _places(block, site, columns.device)
        away = (rows[:, None] - keys).clamp(min=0)
        return torch.minimum(before[0][..., None, :], before[1][..., away])


def _places(block: int, site: Site, device: torch.device) -> tuple[Tensor, Tensor]:
    """The last block of keys that each block of queries may see, and all blocks of keys."""
    end = torch.arange(1, -(-site.queries // block) + 1, device=device) * block + site.offset
    return (end.clamp(max=site.keys) - 1) // block, torch.arange(-(-site.keys // block), device=device)


def _logits(q: Float[Tensor, "b h m d"], k: Float[Tensor, "b h n d"], site: Site) -> Float[Tensor, "b h m n"]:
    logits = q @ k.mT * site.scale
    return logits if site.softcap is None else site.softcap * torch.tanh(logits / site.softcap)


def _of_map(pooled_q: Tensor, pooled_k: Tensor, block: int, site: Site) -> Float[Tensor, "b h nqb nkb"]:
    """What is held before each block, if blocks of the whole pooled map are taken in their order; 1 is all of it."""
    rows, keys = _places(block, site, pooled_q.device)
    share = _logits(pooled_q, pooled_k, site).masked_fill(keys > rows[:, None], -torch.inf).softmax(-1) / len(rows)
    return ops.mass_before(share.flatten(2)).view(share.shape)


def distance(p: Float[Tensor, "*rows n"], q: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """The square root of the Jensen-Shannon divergence: sqrt(KL(p || m) / 2 + KL(q || m) / 2), m their mean."""
    m = (p + q) / 2
    both = (torch.xlogy(x, x / m.clamp(min=torch.finfo(m.dtype).tiny)).sum(-1) for x in (p, q))
    return (sum(both) / 2).clamp(min=0).sqrt()
