"""Columns and diagonals: how much attention lies on each, and how many of them a number of pairs pays for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.selection import Lines, causal_mask
from saccade.ops import device, dispatch
from saccade.ops.attend.api import check
from saccade.ops.column_scores.api import back_ends


@torch.no_grad()
def line_scores(
    q: Float[Tensor, "b h w d"],
    k: Float[Tensor, "b g k d"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> tuple[Float[Tensor, "b h k"], Float[Tensor, "b h k"]]:
    """Attention of the last `w` queries, float32, summed over each column and over each diagonal.

    A diagonal is numbered by how far its keys are behind their queries. Far ones have fewer rows; sums stay sums.
    For choosing lines: it has no gradient.

    impl: "auto", "torch" (all weights of one call at once), "triton" (CUDA, up to 128 queries; first there)
    report: is told which back end ran, as "line_scores:torch"

    Raises:
        BadInput: shapes or dtypes that do not fit together, or more queries than keys.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, k, k)
    if q.shape[2] > k.shape[2]:
        asked = f"line scores of {q.shape[2]} queries over {k.shape[2]} keys"
        raise BadInput(asked, "the queries are the last of the keys", "Give all keys.")
    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
    there = {name: why for name, why in back_ends(q, k).items() if name != "reference"}
    if dispatch.pick("line_scores", impl, there, report) == "torch":
        return _line_scores(q, k, **options)
    from saccade.ops.column_scores import triton as kernels

    return kernels.line_sums(q, k, causal=True, lines=True, **options)


def _line_scores(q: Tensor, k: Tensor, *, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """By rows of the whole table of weights."""
    last, n = q.shape[2], k.shape[2]
    rows = q.float().unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("bgsld,bgkd->bgslk", rows, k.float()).flatten(1, 2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits[..., -last:].masked_fill_(~causal_mask(last, last, q.device), -torch.inf)
    p = logits.softmax(-1)
    columns = torch.zeros_like(p[:, :, 0])
    diagonals = torch.nn.functional.pad(columns, (0, last))
    for r in range(last):  # row by row: no temporary of the size of p. Key j is n - last + r - j behind row r
        columns += p[:, :, r]
        diagonals[..., last - 1 - r : n + last - 1 - r] += p[:, :, r]
    return columns, diagonals[..., :n].flip(-1)


def draw_lines(
    columns: Int[Tensor, "b h v"],
    diagonals: Int[Tensor, "b h s"],
    counts: Int[Tensor, "b h 2"],
    *,
    block: int,
    queries: int,
    keys: int,
) -> Lines:
    """The first `counts` columns and diagonals of each head's ranking."""

    def first(ranked: Tensor, count: Tensor) -> Tensor:
        most = int(count.max())
        return torch.where(torch.arange(most, device=count.device) < count[..., None], ranked[..., :most], -1).int()

    v, s = counts.unbind(-1)
    return Lines(verticals=first(columns, v), slashes=first(diagonals, s), block=block, queries=queries, keys=keys)


def fit_lines(
    columns: Int[Tensor, "b h k"],
    diagonals: Int[Tensor, "b h k"],
    sizes: Float[Tensor, "h 2"],
    *,
    row_tokens: int,
    block: int,
    queries: int,
) -> Lines:
    """As many columns and diagonals of each ranking as fit into `row_tokens` keys a row, in the proportion of `sizes`.

    The number of diagonals comes from an estimate of the pairs; what they then really cost is counted, and columns take
    the rest. The first diagonal is always there, even where it alone costs more.
    """
    keys = columns.shape[-1]
    shape = {"block": block, "queries": queries, "keys": keys}
    seen = torch.arange(keys - queries + 1, keys + 1, device=columns.device).double()
    allowed = seen.clamp(max=row_tokens).sum()
    share = sizes / sizes.amax(-1, keepdim=True)
    pairs = _Pairs(columns, diagonals, block, queries)
    s = _counts(_largest(lambda t: pairs(_counts(t, share)) <= allowed, keys, columns[..., 0]), share)[..., 1]
    while True:
        runs, cost = _paid(draw_lines(columns[..., :0], diagonals, torch.stack([s * 0, s], -1), **shape))
        over = (runs > allowed) & (s > 1)
        if not over.any():
            break
        s = torch.where(over, (0.95 * s * allowed / runs).long().clamp(min=1), s)
    v = (cost.gather(-1, columns).cumsum(-1) <= (allowed - runs)[..., None]).sum(-1)
    return draw_lines(columns, diagonals, torch.stack([v, s], -1), **shape)


def _paid(lines: Lines) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h k"]]:
    """Pairs that the diagonals' runs compute, and what each column would add: the rows behind it that do not cover it.

    The latter for all columns at once, from the steps of a staircase: up where rows begin to pay, down where they end.
    """
    start, end = _runs(lines)
    first = torch.arange(0, lines.queries, lines.block, device=start.device)
    rows = (lines.queries - first).clamp(max=lines.block)
    limit = first + rows + lines.offset
    free = (rows[:, None] * (end > start)).flatten(2).double()
    step = torch.zeros(*start.shape[:2], lines.keys + 1, dtype=torch.float64, device=start.device)
    step.scatter_add_(-1, start.flatten(2), -free)
    step.scatter_add_(-1, torch.minimum(end, limit[:, None]).flatten(2), free)
    step[..., 0] += lines.queries
    step.index_add_(-1, limit, -rows.double().expand(*start.shape[:2], -1))
    before = (first + lines.offset)[:, None] - start  # keys of a run that come before the block's first row
    pairs = _ladder(before + rows[:, None], end - start) - _ladder(before, end - start)
    return pairs.flatten(2).sum(-1).double(), step.cumsum(-1)[..., :-1]


def _runs(lines: Lines) -> tuple[Int[Tensor, "b h nqb t"], Int[Tensor, "b h nqb t"]]:
    """First key and end of every run of the diagonals; equal where there are fewer."""
    if not lines.slashes.is_cuda or device.machine_reasons(lines.slashes):
        ranges = lines.gather().ranges
        assert ranges is not None
        start, end = ranges.long().unbind(-1)
        return start, end
    from saccade.ops.attend.triton import lines as kernels

    count, first = kernels.runs(lines, lines.slashes.device)
    there = torch.arange(first.shape[-1], device=first.device) < count[..., None]
    start = torch.where(there, first.long(), 0)
    return start, torch.where(there, (start + lines.block).clamp(max=lines.keys), start)


def _ladder(x: Tensor, most: Tensor) -> Tensor:
    """The sum of min(i, most) over i = 1 .. x."""
    low = torch.minimum(x.clamp(min=0), most)
    return low * (low + 1) // 2 + (x - most).clamp(min=0) * most


def _counts(scale: Int[Tensor, "b h"], share: Float[Tensor, "h 2"]) -> Int[Tensor, "b h 2"]:
    """Columns and diagonals at a scale; one diagonal at least."""
    counts = (scale[..., None] * share).long()
    counts[..., 1].clamp_(min=1)
    return counts


def _largest(fits: Callable[[Tensor], Tensor], most: int, like: Int[Tensor, "b h"]) -> Int[Tensor, "b h"]:
    """The largest number in 0 .. most that fits, for each element, by bisection; 0 if none does."""
    low = torch.zeros_like(like)
    high = low + most
    for _ in range(most.bit_length()):
        middle = (low + high + 1) // 2
        good = fits(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle - 1)
    return low


class _Pairs:
    """Estimates how many pairs the first v columns and s diagonals compute, for any v and s.

    In a block of `w` rows that ends before key `end`, a diagonal o covers the keys end - x with x in (o, o + w]. So a
    coordinate x is covered as soon as a diagonal in [x - w, x) is: its entry is the best rank among those, and all
    blocks alike pay for it. A column is paid for in the rows where its coordinate is not covered.
    """

    def __init__(self, columns: Tensor, diagonals: Tensor, block: int, queries: int):
        n, at = columns.shape[-1], columns.device
        self.columns, self.keys, self.offset = columns, n, n - queries
        rank = torch.empty(diagonals.shape, device=at)
        rank.scatter_(-1, diagonals, torch.arange(n, device=at, dtype=rank.dtype).expand_as(rank))
        best = torch.nn.functional.pad(-rank, (block - 1, 0), value=-torch.inf)
        self.entry = -torch.nn.functional.max_pool1d(best, block, stride=1)  # of x = 1 .. n
        x = torch.arange(1, n + 1, device=at)
        reach = -(-queries // block) + 1 - ((x - self.offset).clamp(min=1) + block - 1) // block  # blocks this deep
        weight = (x.clamp(max=block) * reach).double().expand_as(rank)
        paid = torch.zeros(*rank.shape, dtype=torch.float64, device=at).scatter_add_(-1, self.entry.long(), weight)
        self.diagonal_pairs = paid.cumsum(-1)

    def __call__(self, counts: Int[Tensor, "b h 2"]) -> Float[Tensor, "b h"]:
        v, s = counts.unbind(-1)
        covered = self.diagonal_pairs.gather(-1, s[..., None] - 1)[..., 0]
        free = torch.nn.functional.pad((self.entry >= s[..., None]).float().cumsum(-1), (1, 0))  # of coordinates to x
        # the rows that ask see column j from x = n - j down to offset - j
        rows = free.gather(-1, self.keys - self.columns) - free.gather(-1, (self.offset - self.columns).clamp(min=0))
        first = torch.arange(self.keys, device=rows.device) < v[..., None]
        return covered + (rows * first).sum(-1, dtype=torch.float64)
