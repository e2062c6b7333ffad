"""Attention over a selection."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from saccade.core.selection import Selection
from saccade.ops.attend import reference


def attend(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k d"],
    selection: Selection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """softmax over the selected pairs. Returns the output and the natural-log sum of exponentials of each row."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.masked(q, k, v, selection.mask(), scale=scale, softcap=softcap)
