"""How much attention a few queries pay to every key."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.core.selection import causal_mask


def column_scores(
    q: Float[Tensor, "b h w d"],
    k: Float[Tensor, "b g k d"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    impl: str = "auto",
) -> Float[Tensor, "b h k"]:
    """sum over the rows of softmax(scale q k^T), float32; with `causal` the queries are the last of the keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("bgswd,bgkd->bgswk", grouped, k.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        logits = logits.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -torch.inf)
    return logits.softmax(-1).sum(-2).flatten(1, 2)
