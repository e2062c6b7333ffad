"""Launches of the kernels for a grid. Everything lies in the order of the tokens, and nothing is copied.

There is no form that Triton specialises by warp on Hopper, as there is for lists: with boxes of two and three axes the
compiler (3.6) gave wrong results at every head size.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from saccade.ops.attend.triton import launch as lists
from saccade.ops.attend.triton.grid import Grid, kernels
from saccade.ops.attend.triton.hopper import described as even
from saccade.ops.attend.triton.hopper import scratch
from saccade.ops.attend.triton.launch import Shape, power, row_sums
from saccade.ops.attend.triton.lists import MOST, MOST_WIDE, TILE, strides


def rows(dtype: torch.dtype, wide: int) -> int:
    """Queries of a program."""
    if dtype == torch.float32:
        return MOST_WIDE
    return MOST if wide <= 128 else MOST // 2


def forward(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, scale: float, cap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, lse in float32, and in float32 its two halves [2 b h q]."""
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    aux = torch.empty(2, *lse.shape, dtype=torch.float32, device=q.device) if q.dtype == torch.float32 else None
    if lse.numel():
        over_keys(q, k, v, None, out, lse, aux, None, grid, scale, cap)
    return out, lse, aux


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Float[Tensor, "b h q"],
    aux: Float[Tensor, "2 b h q"] | None,
    d_out: Tensor,
    d_lse: Float[Tensor, "b h q"],
    grid: Grid,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if lse.numel():
        delta, base = row_sums(out, d_out, lse, d_lse)
        over_keys(q, k, v, d_out, dq, base, aux, delta, grid, scale, cap)
        over_queries(q, k, v, d_out, base, aux, delta, dk, dv, grid, scale, cap)
    return dq, dk, dv


def over_keys(q, k, v, d_out, out, lse, aux, delta, grid: Grid, scale: float, cap: float | None,
              shape: Shape | None = None) -> None:
    """Forward into out and lse; with d_out dQ into out."""
    (b, h, _, d), g, size = q.shape, k.shape[1], v.shape[-1]
    back, wide = d_out is not None, max(power(d), power(size))
    high = rows(q.dtype, wide)
    if shape is None:
        shape = lists.backward_shape(q.dtype, wide, high) if back else lists.forward_shape(q.dtype, wide, high, TILE)
    box, step = grid.box(high), grid.box(shape.step)
    nothing = q
    kernels.over_keys[(grid.tiles(box) * (h // g), g, b)](
        q, k, v, d_out if back else nothing, out, lse, nothing if aux is None else aux, delta if back else nothing,
        scale, cap or 1.0, h, h // g, *grid.size, *grid.wide, *grid.gap, *strides(q, k, v, d_out, out),
        D=d, DVS=size, BD=power(d), BDV=power(size), BZ=box[0], BY=box[1], BX=box[2], SZ=step[0], SY=step[1],
        SX=step[2], AXES=grid.axes, CAUSAL=grid.causal, CAPPED=cap is not None, BACKWARD=back, WIDE=aux is not None,
        num_warps=shape.warps, num_stages=shape.stages,
    )


def over_queries(q, k, v, d_out, lse, aux, delta, dk, dv, grid: Grid, scale: float, cap: float | None,
                 shape: Shape | None = None) -> None:
    """dK and dV, written whole."""
    (b, h, _, d), g, size = q.shape, k.shape[1], v.shape[-1]
    wide, described = max(power(d), power(size)), _described(q, d_out, grid)
    if shape is None:
        shape = lists.turned_shape(q.dtype, wide)
    if described:
        triton.set_allocator(scratch)
    box, step = grid.box(lists.turned_keys(q.dtype, wide, TILE)), grid.box(shape.step)
    kernels.over_queries[(grid.tiles(box), g, b)](
        q, k, v, d_out, lse, q if aux is None else aux, delta, dk, dv,
        scale, cap or 1.0, h, h // g, *grid.size, *grid.wide, *grid.gap, *strides(q, k, v, d_out, dk, dv),
        D=d, DVS=size, BD=power(d), BDV=power(size), BZ=box[0], BY=box[1], BX=box[2], SZ=step[0], SY=step[1],
        SX=step[2], AXES=grid.axes, CAUSAL=grid.causal, CAPPED=cap is not None, WIDE=aux is not None,
        DESCRIBED=described, num_warps=shape.warps, num_stages=shape.stages,
    )


def _described(q: Tensor, d_out: Tensor, grid: Grid) -> bool:
    """Whether the queries of dK and dV come by tensor descriptors: rows of whole 16 bytes, lse and delta too."""
    if not q.is_cuda or torch.version.hip or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    lines = grid.gap[2] == 1 and grid.size[2] % 4 == 0
    return q.dtype != torch.float32 and lines and even(q) and even(d_out)
