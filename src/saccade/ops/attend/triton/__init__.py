"""Attention over a selection by kernels of our own in Triton, for a CUDA device; forward and backward, with lse.

Every kind of selection becomes lists (`lists.py`): numbers of whole key blocks, lists of keys, ranges, or a window,
for each query block. One kernel walks over them (`kernels.py`), query heads that read the same keys side by side. Spans
on a grid (`grid/`) and buckets (`buckets/`) have kernels of their own. Triton is imported with the first call.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from saccade.core.selection import Blocks, Buckets, PerHead, Places, Selection, Spans
from saccade.ops import device
from saccade.ops.attend.triton import grid
from saccade.ops.attend.triton.grid import Grid
from saccade.ops.attend.triton.lists import TILE, Lists, listed
from saccade.ops.attend.triton.lists import reasons as of_selection

SIZES = (16, 256)  # of a head
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT32 = 128  # largest head whose gradients it computes in float32


def reasons(q: Tensor, v: Tensor, selection: Selection, scale: float) -> list[str]:
    """Why it cannot compute this; [] means that it can."""
    out = device.machine_reasons(q)
    if q.dtype not in DTYPES:
        out.append(f"it computes in float16, bfloat16 and float32, and the inputs are {str(q.dtype).split('.')[-1]}")
    odd = [d for d in (q.shape[-1], v.shape[-1]) if not SIZES[0] <= d <= SIZES[1]]
    if odd:
        out.append(f"heads of {odd[0]}; it takes {SIZES[0]} to {SIZES[1]}")
    if q.dtype == torch.float32 and max(q.shape[-1], v.shape[-1]) > FLOAT32 and _wants_gradients(q, v):
        out.append(f"gradients in float32 of heads above {FLOAT32}: theirs have three times PyTorch's rounding error")
    if not scale > 0:
        out.append(f"a scale of {scale:g}; it takes positive ones")
    if q.is_cuda and q.dtype == torch.float32 and _on_a_grid(selection) and selection.causal:
        out.append("a causal grid in float32: some rows came out as NaN on an H200 (Triton 3.6)")
    if torch.are_deterministic_algorithms_enabled() and adds_up(selection) and _wants_gradients(q, v):
        why = "added up in no fixed order, and deterministic algorithms are asked for"
        out.append(f"its gradients over {selection.kind} are {why}")
    if isinstance(selection, Buckets):
        return out
    return out + (grid.reasons(selection) if _on_a_grid(selection) else of_selection(selection))


def _on_a_grid(selection: Selection) -> TypeGuard[Spans]:
    return isinstance(selection, Spans) and bool(selection.grid)


def adds_up(selection: Selection) -> bool:
    """Whether gradients of keys and values come from several programs."""
    if isinstance(selection, PerHead):
        return any(adds_up(part) for _, part in selection.parts)
    blocks = isinstance(selection, Blocks) and selection.q_block % TILE == selection.k_block % TILE == 0
    return not (blocks or isinstance(selection, (Buckets, Spans)))


def _wants_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def attend(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    selection: Selection,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """softmax over the selected pairs, and lse; differentiable in q, k, v through both."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Attend.apply(q, k, v, _parts(selection, q, q.shape[1] // k.shape[1]), scale, softcap)  # type: ignore[return-value]


def _parts(selection: Selection, q: Tensor, group: int) -> list[Lists] | Grid | Places:
    """What its kernels walk."""
    if isinstance(selection, Buckets):
        return selection.places().to(q.device)
    return grid.of(selection) if _on_a_grid(selection) else listed(selection, q, group)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: list[Lists] | Grid | Places, scale: float,
        softcap: float | None,
    ):
        out, lse, aux = _launches(parts).forward(q, k, v, parts, scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse, aux)
        ctx.rest = parts, scale, softcap
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor):  # type: ignore[override]
        back = _launches(ctx.rest[0]).backward
        return (*back(*ctx.saved_tensors, d_out, d_lse, *ctx.rest), None, None, None)


def _launches(parts: list[Lists] | Grid | Places) -> Any:
    """The module that launches the kernels."""
    if isinstance(parts, Places):
        from saccade.ops.attend.triton.buckets import launch
    elif isinstance(parts, Grid):
        from saccade.ops.attend.triton.grid import launch
    else:
        from saccade.ops.attend.triton import launch
    return launch
