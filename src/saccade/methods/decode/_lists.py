"""Lists of keys by their positions, made on the device without asking it anything."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def numbers(counts: list[list[int]], device: torch.device) -> Int[Tensor, "b q 1"]:
    """Of each query and sequence; where all are alike, nothing is copied from the host."""
    (one, *others) = {n for row in counts for n in row}
    if others:
        return torch.tensor(counts, device=device).T[..., None]
    return torch.full((len(counts[0]), len(counts), 1), one, device=device)


def places(positions: Int[Tensor, "b g k"], wanted: Int[Tensor, "b g q l"]) -> Int[Tensor, "b g q l"]:
    """Where the keys of these positions are stored; -1 for those that are not."""
    flat = wanted.flatten(2)
    at = torch.searchsorted(positions.contiguous(), flat).clamp(max=positions.shape[-1] - 1)
    return torch.where(positions.gather(-1, at) == flat, at, -1).view_as(wanted).int()
