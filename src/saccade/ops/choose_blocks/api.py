"""From a score for each block of the attention map to the blocks that are computed: the best that the pairs pay for.

`choose_blocks` gives every row of blocks its share of the pairs. `cover_blocks` lets the rows and heads of a sequence
share them: those whose attention is spread out get more blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.selection import Blocks
from saccade.ops import device, dispatch
from saccade.ops.topk.api import LONG

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
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> Blocks:
    """Of each row of blocks the diagonal, and the best or all that are good enough; causal, queries the last of keys.

    row_tokens: as many pairs as rows of so many keys (fewer where there are fewer) make, at most; what is left of a
        block is carried on to the next row of blocks. At least a block, or two where `queries` does not begin at one
    threshold: instead, the blocks whose share of softmax(score) reaches it
    whole_last: the last rows of blocks that see everything, as long as that takes at most an eighth of the other pairs
    impl: "auto", "torch" (of equal scores any), "triton" (CUDA, first there; with row_tokens; of equal ones the first)
    report: is told which back end ran, as "choose_blocks:torch"

    Raises:
        BadInput: scores of another shape, or not one of `row_tokens` and `threshold`.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    _check(score, queries, keys, block, row_tokens, threshold)
    plan = _plan(keys if row_tokens is None else row_tokens, queries, keys, block, whole_last, score.device)
    name = dispatch.pick("choose_blocks", impl, _back_ends(score, threshold), report)
    if name == "triton":
        return Blocks(**plan.lists(score), queries=queries, keys=keys, q_block=block, k_block=block)
    keep = plan.best(score) if threshold is None else plan.above(score, threshold)
    return Blocks.of(keep, queries=queries, keys=keys, q_block=block, k_block=block)


@torch.no_grad()
def cover_blocks(
    entry: Float[Tensor, "b h nqb nkb"],
    *,
    queries: int,
    keys: int,
    block: int,
    row_tokens: int | None = None,
    threshold: float | None = None,
) -> Blocks:
    """The diagonal, and the blocks of smallest entry in all rows and heads; causal, queries the last of keys.

    entry: how much attention is held already by what comes before a block, as `mass_before` counts it; where it is
        below 0 the block comes before all that are not
    row_tokens: all heads of a sequence together make as many pairs as rows of so many keys (fewer where there are
        fewer) in each of them would, at most; the first of equal entries are taken
    threshold: instead, the blocks with an entry below it: as many as it takes to hold that share

    Raises:
        BadInput: entries of another shape, or not one of `row_tokens` and `threshold`.
    """
    _check(entry, queries, keys, block, row_tokens, threshold)
    plan = _plan(keys if row_tokens is None else row_tokens, queries, keys, block, 0, entry.device)
    keep = plan.cheapest(entry) if threshold is None else (entry < threshold) & plan.allowed | plan.forced
    return Blocks.of(keep, queries=queries, keys=keys, q_block=block, k_block=block)


def mass_before(
    mass: Float[Tensor, "*rows n"], first: Bool[Tensor, "*rows n"] | None = None
) -> Float[Tensor, "*rows n"]:
    """How much the larger ones of a row hold together, for each of its elements; those that are `first` lead anyhow."""
    key = mass if first is None else mass + first * (mass.amax(-1, keepdim=True) + 1)
    order = key.argsort(dim=-1, descending=True, stable=True)
    ranked = mass.gather(-1, order)
    return torch.empty_like(mass).scatter_(-1, order, ranked.cumsum(-1) - ranked)


def _back_ends(score: Tensor, threshold: float | None) -> dict[str, Callable[[], dispatch.Reasons]]:
    def by_triton() -> list[str]:
        why = device.triton_reasons(score.detach())
        why += ["it takes as many blocks as row_tokens pays for, and a threshold was given"] * (threshold is not None)
        why += ["it compares in float32, and the scores are float64"] * (score.dtype == torch.float64)
        why += [f"{score.shape[-1]} key blocks; it takes up to {LONG}"] * (score.shape[-1] > LONG)
        return why + ["there is nothing to read"] * (not score.numel())

    return dispatch.with_triton(score, by_triton, {"torch": list})


def _check(
    score: Tensor, queries: int, keys: int, block: int, row_tokens: int | None, threshold: float | None
) -> None:
    grid = (-(-queries // block), -(-keys // block))
    if tuple(score.shape[-2:]) != grid or (row_tokens is None) == (threshold is None):
        asked = f"blocks of {block} for {queries} queries over {keys} keys, row_tokens={row_tokens}, {threshold=}"
        found = f"the scores are for {tuple(score.shape[-2:])} blocks"
        raise BadInput(asked, found, "Give scores of that shape, and one of the two.")


@dataclass(frozen=True)
class _Plan:
    """Of each row of blocks: which key blocks it may see, which it sees anyhow, and how many in all; what one of the
    others costs, and how many pairs there are for them; how many it may see, and where its list begins.
    """

    allowed: Bool[Tensor, "nqb nkb"]
    forced: Bool[Tensor, "nqb nkb"]
    count: Int[Tensor, " nqb"]
    width: int
    size: Int[Tensor, " nqb"]
    spare: float
    seen: Int[Tensor, " nqb"]
    start: Int[Tensor, " nqb+1"]
    total: int

    def best(self, score: Float[Tensor, "b h nqb nkb"]) -> Bool[Tensor, "b h nqb nkb"]:
        """As many as planned."""
        score = score.masked_fill(self.forced, torch.inf).masked_fill(~self.allowed, -torch.inf)
        top = score.topk(self.width, -1).indices
        use = torch.arange(self.width, device=top.device) < self.count[:, None]
        keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, use.expand_as(top))
        return keep & self.allowed | self.forced

    def lists(self, score: Float[Tensor, "b h nqb nkb"]) -> dict[str, Tensor]:
        """The same as compressed rows; how long they are is known, so that nothing waits for the device."""
        from saccade.ops.topk.triton import packed

        score = score.float().masked_fill(self.forced, torch.inf)
        col = packed(score, self.start, self.seen, self.total)
        return {"crow": self.start.expand(*score.shape[:2], -1).contiguous(), "col": col}

    def above(self, score: Float[Tensor, "b h nqb nkb"], threshold: float) -> Bool[Tensor, "b h nqb nkb"]:
        """Those whose share of a row is large enough."""
        share = score.masked_fill(~self.allowed, -torch.inf).softmax(-1)
        return (share >= threshold) & self.allowed | self.forced

    def cheapest(self, entry: Float[Tensor, "b h nqb nkb"]) -> Bool[Tensor, "b h nqb nkb"]:
        """Those of smallest entry in each sequence, as many as the pairs of all its heads pay for."""
        flat = entry.masked_fill(~self.allowed | self.forced, torch.inf).flatten(1)
        cost = (self.size[:, None] * self.allowed).double().expand(entry.shape[1:]).flatten()
        value, order = flat.sort(dim=-1, stable=True)
        paid = cost[order].cumsum(-1) <= self.spare * entry.shape[1] + 1e-6
        keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order, paid & value.isfinite())
        return keep.view(entry.shape) | self.forced


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
    seen = here[:, 0] + 1
    kept = torch.minimum(count, seen)
    kept[ends:] = seen[ends:]
    start = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    mine = (allowed, forced, count, size, seen.int(), start.int())
    allowed, forced, count, size, seen, start = (x.to(device) for x in mine)
    return _Plan(allowed, forced, count, width, size, float(total), seen, start, int(kept.sum()))
