"""Attention over disjoint key sets, made one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.ops import device


def merge_lse(
    outs: Sequence[Float[Tensor, "b h q d"]], lses: Sequence[Float[Tensor, "b h q"]]
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """softmax over the union of disjoint key sets, from each set's output and natural log-sum-exp.

    out = sum_i exp(lse_i - lse) out_i,  lse = log sum_i exp(lse_i). Differentiable; a set that a row cannot see has
    lse = -inf (and gets no gradient), and a row that sees nothing gives zeros and -inf.

    Raises:
        BadInput: no parts, or parts whose shapes differ.
    """
    _check(outs, lses)
    if _by_kernel(outs, lses):
        from saccade.ops.merge_lse import triton as kernels

        return kernels.merge_lse(outs, lses)
    stacked = torch.stack(list(lses))
    top = stacked.detach().amax(0).clamp(min=torch.finfo(stacked.dtype).min)
    weight = torch.exp(stacked - top)  # exactly 0, with gradient 0, where lse_i is -inf
    total = weight.sum(0)
    some = total > 0
    safe = torch.where(some, total, 1.0)  # chosen before the logarithm, or its gradient would be NaN
    lse = torch.where(some, torch.log(safe) + top, -torch.inf)
    out = torch.zeros_like(outs[0], dtype=stacked.dtype)
    for o, w in zip(outs, weight):
        out = out + o * (w / safe)[..., None]
    return out.to(outs[0].dtype), lse


def _by_kernel(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    """Whether our own kernel merges them: on a CUDA device, up to float32."""
    kinds = {x.dtype for x in outs}, {x.dtype for x in lses}
    narrow = kinds[0] in [{d} for d in (*device.HALVES, torch.float32)] and kinds[1] == {torch.float32}
    return outs[0].is_cuda and narrow and not device.machine_reasons(outs[0])


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outs) != len(lses) or not outs:
        raise BadInput(f"merge {len(outs)} outputs with {len(lses)} lses", "each output has its lse", "Give both.")
    for o, e in zip(outs, lses):
        if o.shape != outs[0].shape or e.shape != o.shape[:-1]:
            found = f"an output {tuple(o.shape)} with lse {tuple(e.shape)}"
            raise BadInput(f"merge outputs {tuple(outs[0].shape)}", found, "Give parts of the same rows.")
