"""From a score for each block of the attention map to the blocks that are computed: the best that the pairs pay for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.selection import Blocks

WHOLE = 1 / 8  # of the pairs beside the diagonal, at most, goes to rows that see everything


@torch.no_grad()
def choose_blocks(
    score: Float[Tensor, "b h nqb nkb"],
    *,
    queries: int,
    keys: int,
    block: int,
    row_tokens: int | None = None,
    threshold: float | None = None,
    whole_last: int = 0,
) -> Blocks:
    """Of each row of blocks the diagonal, and the best or all that are good enough; causal, queries the last of keys.

    row_tokens: as many pairs as rows of so many keys (fewer where there are fewer) make, at most; what is left of a
        block is carried on to the next row of blocks. At least a block, or two where `queries` does not begin at one
    threshold: instead, the blocks whose share of softmax(score) reaches it
    whole_last: the last rows of blocks that see everything, as long as that takes at most an eighth of the other pairs

    Raises:
        BadInput: scores of another shape, or not one of `row_tokens` and `threshold`.
    """
    grid = (-(-queries // block), -(-keys // block))
    if tuple(score.shape[-2:]) != grid or (row_tokens is None) == (threshold is None):
        asked = f"blocks of {block} for {queries} queries over {keys} keys, row_tokens={row_tokens}, {threshold=}"
        found = f"the scores are for {tuple(score.shape[-2:])} blocks"
        raise BadInput(asked, found, "Give scores of that shape, and one of the two.")
    plan = _plan(keys if row_tokens is None else row_tokens, queries, keys, block, whole_last, score.device)
    keep = plan.best(score) if threshold is None else plan.above(score, threshold)
    return Blocks.of(keep, queries=queries, keys=keys, q_block=block, k_block=block)


@dataclass(frozen=True)
class _Plan:
    """Of each row of blocks: which key blocks it may see, which it sees anyhow, and how many in all."""

    allowed: Bool[Tensor, "nqb nkb"]
    forced: Bool[Tensor, "nqb nkb"]
    count: Int[Tensor, " nqb"]
    width: int

    def best(self, score: Float[Tensor, "b h nqb nkb"]) -> Bool[Tensor, "b h nqb nkb"]:
        """As many as planned."""
        score = score.masked_fill(self.forced, torch.inf).masked_fill(~self.allowed, -torch.inf)
        top = score.topk(self.width, -1).indices
        use = torch.arange(self.width, device=top.device) < self.count[:, None]
        keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, use.expand_as(top))
        return keep & self.allowed | self.forced

    def above(self, score: Float[Tensor, "b h nqb nkb"], threshold: float) -> Bool[Tensor, "b h nqb nkb"]:
        """Those whose share of a row is large enough."""
        share = score.masked_fill(~self.allowed, -torch.inf).softmax(-1)
        return (share >= threshold) & self.allowed | self.forced


@functools.lru_cache(maxsize=8)
def _plan(row: int, queries: int, keys: int, block: int, whole: int, device: torch.device) -> _Plan:
    """The same for all layers of a forward. A whole row takes `dear` pairs more than its diagonal, a block `size`."""
    position = torch.arange(keys - queries, keys)
    first = position[::block]
    last, own = (first + block).clamp(max=keys) - 1, first // block
    mine = (position - first[0]) // block
    spare = (position + 1).clamp(max=row) - (position + 1 - own[mine] * block)
    spare = torch.zeros(len(first), dtype=torch.float64).index_add_(0, mine, spare.double())
    size = (last - first + 1) * block
    dear, total = own * size, spare.sum()
    ends = len(first) - int((dear.flip(0)[:whole].cumsum(0) <= total * WHOLE).sum())
    spare = spare[:ends] * ((total - dear[ends:].sum()) / spare[:ends].sum().clamp(min=1))
    more = (spare / size[:ends]).cumsum(0).add(1e-6).floor().long().diff(prepend=own.new_zeros(1))
    place, here = torch.arange(-(-keys // block)), last[:, None] // block
    allowed = place <= here
    forced = allowed & ((place >= own[:, None]) | (torch.arange(len(first)) >= ends)[:, None])
    count = here[:, 0] - own + 1
    count[:ends] += more
    width = min(int(count[:ends].max()), len(place)) if ends else 1
    return _Plan(allowed.to(device), forced.to(device), count.to(device), width)
