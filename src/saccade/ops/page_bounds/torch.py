"""Bounds of pages in plain torch: readable, and the oracle."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def page_bounds(
    k: Float[Tensor, "b g k d"], page_tokens: int
) -> tuple[Float[Tensor, "b g p d"], Float[Tensor, "b g p d"]]:
    """Least and largest value of every channel over the keys of each page."""
    spare = -k.shape[2] % page_tokens
    low, high = (
        torch.nn.functional.pad(k, (0, 0, 0, spare), value=end).unflatten(2, (-1, page_tokens))
        for end in (torch.inf, -torch.inf)
    )
    return low.amin(3), high.amax(3)


def page_scores(
    q: Float[Tensor, "b h q d"], low: Float[Tensor, "b g p d"], high: Float[Tensor, "b g p d"], by_group: bool
) -> Float[Tensor, "b h|g q p"]:
    """sum_d max(q_d low_d, q_d high_d) = max(q, 0).high + min(q, 0).low"""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).unflatten(1, (low.shape[1], -1))
    scores = rows.clamp(min=0) @ high[:, :, None].to(wide).mT + rows.clamp(max=0) @ low[:, :, None].to(wide).mT
    return scores.amax(2) if by_group else scores.flatten(1, 2)
