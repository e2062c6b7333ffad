"""Attention over disjoint key sets, made one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def merge_lse(
    outs: Sequence[Float[Tensor, "b h q d"]], lses: Sequence[Float[Tensor, "b h q"]]
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """softmax over the union of disjoint key sets, from each set's output and natural log-sum-exp.

    out = sum_i exp(lse_i - lse) out_i,  lse = log sum_i exp(lse_i). Differentiable; a set that a row cannot see has
    lse = -inf, and a row that sees nothing gives zeros.
    """
    stacked = torch.stack(list(lses))
    lse = torch.logsumexp(stacked, 0)
    weight = torch.exp(stacked - lse.masked_fill(lse == -torch.inf, 0.0))
    out = torch.zeros_like(outs[0], dtype=stacked.dtype)
    for o, w in zip(outs, weight):
        out = out + o * w[..., None]
    return out.to(outs[0].dtype), lse
