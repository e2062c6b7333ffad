"""Positions of a layer's tokens: along one axis in a text, along two in a picture."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.method import Slot
from saccade.methods.nets._attention import turned


def placed(x: Float[Tensor, "b h n d"], at: Int[Tensor, " n"], slot: Slot) -> Float[Tensor, "b h n d"]:
    """Turned to these places; of a picture cells are counted row by row."""
    axes = [at[None]] if slot.grid is None else [at[None] // slot.grid[1], at[None] % slot.grid[1]]
    return turned(x, axes)


def placed_apart(x: Float[Tensor, "b h n d"], at: Int[Tensor, "*b_h n"]) -> Float[Tensor, "b h n d"]:
    """The same, to places in a text that may differ from head to head."""
    return turned(x.flatten(0, 1)[:, None], [at.expand(x.shape[:3]).flatten(0, 1)])[:, 0].view_as(x)
