"""What layers of attention share: texts in pieces, and rows of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadInput, CannotRun
from saccade.core.method import Slot
from saccade.core.site import State

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # the last queries, all keys and values so far -> output


def refuse_causal_pictures(name: str, slot: Slot) -> None:
    """Of a layer that looks around in a picture.

    Raises:
        CannotRun: a picture in which no token may see a later one.
    """
    if slot.grid and slot.causal:
        found = "a picture has no order in which cells come"
        raise CannotRun(f"{name} in a causal net of pictures", found, "Give a slot without the grid.")


def check_cells(name: str, slot: Slot, tokens: int) -> None:
    """That a picture comes whole.

    Raises:
        BadInput: tokens that are not the cells of the grid.
    """
    if slot.grid and tokens != slot.grid[0] * slot.grid[1]:
        found = f"the grid is {slot.grid}"
        raise BadInput(f"{name} of {tokens} tokens", found, "Give a token for each of its cells.")


def fresh(x: Float[Tensor, "b n c"], heads: int) -> State:
    """The state before the first token."""
    none = x.new_zeros(len(x), heads, 0, x.shape[2] // heads)
    return {"keys": none, "values": none, "count": torch.zeros(len(x), dtype=torch.long, device=x.device)}


def in_pieces(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    state: State,
    lengths: Int[Tensor, " b"] | None,
    attend: Attend,
) -> tuple[Float[Tensor, "b h n d"], State]:
    """Output, and the state with these keys and values; rows of one length together, so that none sees padding."""
    count = state["count"]
    real = torch.full_like(count, q.shape[2]) if lengths is None else lengths.to(count.device)
    ends = count + real
    out, longest = torch.zeros_like(q), int(ends.max())
    keys, values = (x.new_zeros(*x.shape[:2], longest, x.shape[3]) for x in (k, v))
    pieces = list(alike(count, real))
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


def alike(before: Int[Tensor, " b"], real: Int[Tensor, " b"]) -> Iterator[tuple[Int[Tensor, " rows"], int, int]]:
    """Rows that have as many tokens behind them and as many new ones: which, and how many of both. None without new."""
    size = int(real.max()) + 1
    kinds, which = (before * size + real).unique(return_inverse=True)  # of pairs it is many times slower
    for i, kind in enumerate(kinds.tolist()):
        old, new = divmod(kind, size)
        if kind:
            yield (which == i).nonzero()[:, 0], old, new
