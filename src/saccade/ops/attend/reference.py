"""Masked dense attention in float32 or better: the oracle of every selection kind."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def masked(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    mask: Bool[Tensor, "b h q k"] | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """softmax(scale q k^T + mask) v, and the natural log of each row's sum of exponentials.

    A row that may look nowhere gives zeros and -inf. mask: on the device of q, or on the CPU.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = rearrange(q, "b (g s) q d -> b g s q d", g=k.shape[1]).to(wide)
    logits = torch.einsum("bgsqd,bgkd->bgsqk", grouped, k.to(wide)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = rearrange(logits, "b g s q k -> b (g s) q k")
    if mask is not None:
        logits = logits.masked_fill(~mask.to(q.device), -torch.inf)
    weights, lse = exponentials(logits)
    weights = rearrange(weights, "b (g s) q k -> b g s q k", g=k.shape[1])
    out = torch.einsum("bgsqk,bgkd->bgsqd", weights, v.to(wide))
    return rearrange(out, "b g s q d -> b (g s) q d").to(q.dtype), lse


def exponentials(logits: Float[Tensor, "*rows k"]) -> tuple[Float[Tensor, "*rows k"], Float[Tensor, "*rows"]]:
    """softmax and log-sum-exp along the keys; zeros and -inf where every logit is -inf."""
    lse = torch.logsumexp(logits, -1)  # not exp(logits - lse): the rounding of lse would be in all of the row
    return logits.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0.0), lse
