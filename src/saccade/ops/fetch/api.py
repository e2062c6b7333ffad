"""Rows of a tensor in host memory, on the device that asks for them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.ops import device


def fetch(x: Float[Tensor, "g n d"], place: Int[Tensor, "g r l"]) -> Float[Tensor, "g r l d"]:
    """x[g, place[g]], on the device of `place`; zeros where a place is -1. No gradient.

    From pinned memory a kernel on a CUDA device reads the rows where they lie, and nobody waits. From elsewhere the
    host gathers them, and they are copied.

    Raises:
        BadInput: other heads, or places that are no whole numbers.
    """
    if x.dim() != 3 or place.dim() != 3 or len(x) != len(place) or place.is_floating_point():
        asked = f"fetch rows of {tuple(x.shape)} at {tuple(place.shape)}, {place.dtype}"
        raise BadInput(asked, "they are not [heads, n, size] and [heads, any, any]", "Give whole numbers per head.")
    if place.is_cuda and device.within_reach(x, place) and not device.machine_reasons(place):
        from saccade.ops.fetch import triton as kernel

        return kernel.fetch(x, place)
    at = place.to(x.device).long()
    rows = x[torch.arange(len(x), device=x.device)[:, None, None], at.clamp(min=0)]
    return rows.masked_fill(at[..., None] < 0, 0.0).to(place.device)
