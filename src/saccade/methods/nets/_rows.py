"""What layers that attend share: rows of different lengths, positions, and which way to compute is fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.method import Slot
from saccade.core.selection import Selection
from saccade.core.site import State

THETA = 10_000.0  # base of the rotary embedding
SHORT_TOKENS = 512  # up to here a processor is faster with all pairs under a mask than with many small pieces


def nothing(x: Float[Tensor, "b n c"], heads: int, size: int) -> State:
    """The state before the first token."""
    none = x.new_zeros(len(x), heads, 0, size)
    return {"keys": none, "values": none, "count": torch.zeros(len(x), dtype=torch.long, device=x.device)}


def by_length(
    q: Float[Tensor, "b h n e"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n d"],
    state: State,
    lengths: Int[Tensor, " b"] | None,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Float[Tensor, "b h n d"], State]:
    """Output, and all keys and values so far; rows of one length together, so that none sees padding.

    attend: (new queries, all keys, all values) of rows without padding -> output
    """
    real = torch.full_like(state["count"], q.shape[2]) if lengths is None else lengths.to(q.device)
    ends = state["count"] + real
    out, longest = v.new_zeros(*q.shape[:3], v.shape[-1]), int(ends.max())
    keys, values = (x.new_zeros(*x.shape[:2], longest, x.shape[3]) for x in (k, v))
    pieces = list(_alike(state["count"], real))
    for rows, before, new in pieces:
        own = slice(None) if len(pieces) == 1 else rows
        key, value = (
            torch.cat([old[own][:, :, :before], x[own][:, :, :new]], 2)
            for old, x in ((state["keys"], k), (state["values"], v))
        )
        part = attend(q[own][:, :, :new], key, value)
        if len(pieces) == 1 and new == q.shape[2]:
            return part, {"keys": key, "values": value, "count": ends}
        out[rows, :, :new] = part
        keys[rows, :, : before + new], values[rows, :, : before + new] = key, value
    return out, {"keys": keys, "values": values, "count": ends}


def compute(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float | None = None
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """As `ops.attend`, short texts on a processor under a mask."""
    short = not q.is_cuda and k.shape[2] <= SHORT_TOKENS
    return ops.attend(q, k, v, selection, scale=scale, impl="reference" if short else "auto")


def places(at: Int[Tensor, "b n"], slot: Slot) -> list[Int[Tensor, "b n"]]:
    """Positions by axis: of a line one, of a picture its row and column."""
    return [at] if slot.grid is None else [at // slot.grid[1], at % slot.grid[1]]


def turned(x: Float[Tensor, "b h n d"], axes: list[Int[Tensor, "b n"]]) -> Float[Tensor, "b h n d"]:
    """Rotary embedding: pairs of channels turned by their position; with two axes, half of the channels by each.

    (x1, x2) -> (x1 cos a - x2 sin a, x1 sin a + x2 cos a),  a = position theta^(-2i/d). Source: arXiv 2104.09864.
    """
    out = []
    for part, at in zip(x.chunk(len(axes), -1), axes):
        half = part.shape[-1] // 2
        speed = THETA ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
        angle = at[:, None, :, None] * speed
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = part.chunk(2, -1)
        out += [first * cos - second * sin, first * sin + second * cos]
    return torch.cat(out, -1)


def _alike(before: Int[Tensor, " b"], real: Int[Tensor, " b"]) -> Iterator[tuple[Int[Tensor, " rows"], int, int]]:
    """Rows that have as many tokens behind them and as many new ones: which, and how many of both. None without new."""
    kinds, which = torch.stack([before, real], 1).unique(dim=0, return_inverse=True)
    for i, (old, new) in enumerate(kinds.tolist()):
        if old + new:
            yield (which == i).nonzero()[:, 0], old, new
