"""A few queries, each with its own list of keys: copied together, then two batched products. For decoding."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.ops.attend.reference import exponentials

FEW = 16  # queries; more are faster in tiles, whose products are larger


def gathered(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    index: Int[Tensor, "b h q l"],
    visible: Bool[Tensor, "b h q k"] | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """Causal attention of the last queries over the keys in `index` (-1: none), each listed at most once."""
    (b, h, n, _), g = q.shape, k.shape[1]
    index = index.expand(b, h, n, -1)
    position = torch.arange(k.shape[2] - n, k.shape[2], device=q.device)[:, None]
    allowed = (index >= 0) & (index <= position)
    index = index.clamp(min=0).long()
    if visible is not None:
        allowed = allowed & visible.expand(b, h, n, -1).gather(-1, index)
    by_kv = index.unflatten(1, (g, -1)).flatten(2)
    kind = torch.promote_types(q.dtype, torch.float32)
    keys, values = (_copied(x, by_kv).view(*index.shape, -1).to(kind) for x in (k, v))
    logits = (keys @ q.to(kind)[..., None])[..., 0] * scale  # scaled queries would be rounded once more
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights, lse = exponentials(logits.masked_fill(~allowed, -torch.inf))
    return (weights[..., None, :] @ values)[..., 0, :].to(q.dtype), lse


def _copied(x: Float[Tensor, "b g k d"], index: Int[Tensor, "b g m"]) -> Float[Tensor, "b g m d"]:
    """x at index, by rows: no copy of all keys, whatever their strides."""
    out = x.new_empty(*index.shape, x.shape[-1])
    for b in range(len(x)):
        for g in range(x.shape[1]):
            torch.index_select(x[b, g], 0, index[b, g], out=out[b, g])
    return out
