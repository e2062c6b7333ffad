"""The whole table of weights, then its column sums: readable, and as large as it looks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.selection import causal_mask


def column_scores(
    q: Float[Tensor, "b h w d"], k: Float[Tensor, "b g k d"], *, scale: float, softcap: float | None, causal: bool,
    at: Int[Tensor, " w"] | None = None,
) -> Float[Tensor, "b h k"]:  # fmt: skip
    """sum over the rows of softmax(scale q k^T)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("bgswd,bgkd->bgswk", grouped, k.to(wide)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        seen = causal_mask(q.shape[2], k.shape[2], q.device)
        if at is not None:
            seen = torch.arange(k.shape[2], device=q.device) <= at[:, None]
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).sum(-2).flatten(1, 2)
