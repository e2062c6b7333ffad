"""Launches of the kernels for buckets. Nothing is copied; gradients of keys are of each query head, and summed."""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.selection import Places
from saccade.ops.attend.triton.buckets import kernels
from saccade.ops.attend.triton.launch import backward_shape, forward_shape, power, row_sums, turned_keys, turned_shape
from saccade.ops.attend.triton.lists import MOST, MOST_WIDE, TILE, lined, steps, strides


def forward(
    q: Tensor, k: Tensor, v: Tensor, places: Places, scale: float, cap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, lse in float32, and in float32 its two halves [2 b h q]."""
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    aux = torch.empty(2, *lse.shape, dtype=torch.float32, device=q.device) if q.dtype == torch.float32 else None
    if lse.numel():
        _over_keys(q, k, v, None, out, lse, aux, None, places, scale, cap)
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
    places: Places,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    dq, h, g = torch.empty_like(q, memory_format=torch.contiguous_format), q.shape[1], k.shape[1]
    make = torch.empty if places.k_order.shape[2] == k.shape[2] else torch.zeros
    dk, dv = (
        make(x.shape[0], h, *x.shape[2:], dtype=x.dtype if h == g else torch.float32, device=x.device) for x in (k, v)
    )
    if lse.numel():
        delta, base = row_sums(out, d_out, lse, d_lse)
        _over_keys(q, k, v, d_out, dq, base, aux, delta, places, scale, cap)
        _over_queries(q, k, v, d_out, base, aux, delta, dk, dv, places, scale, cap)
    if h > g:
        dk, dv = (x.unflatten(1, (g, h // g)).sum(2) for x in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _rows(dtype: torch.dtype, wide: int) -> int:
    """Queries of a program."""
    if dtype == torch.float32:
        return MOST_WIDE
    return MOST if wide <= 128 else MOST // 2


def _over_keys(q, k, v, d_out, out, lse, aux, delta, places: Places, scale: float, cap: float | None) -> None:
    """Forward into out and lse; with d_out dQ into out."""
    (b, h, n, d), g, size = q.shape, k.shape[1], v.shape[-1]
    back, wide = d_out is not None, max(power(d), power(size))
    high = _rows(q.dtype, wide)
    shape = backward_shape(q.dtype, wide, high) if back else forward_shape(q.dtype, wide, high, TILE)
    nothing, holed = q, places.hole_low is not None
    kernels.over_keys[(triton.cdiv(n, high), h, b)](
        q, k, v, d_out if back else nothing, out, lse, nothing if aux is None else aux, delta if back else nothing,
        *_lists(places, nothing), scale, cap or 1.0, h, h // g, n, places.k_order.shape[2],
        *strides(q, k, v, d_out, out), *_lined(places),
        D=d, DVS=size, BD=power(d), BDV=power(size), BM=high, BN=shape.step, HOLED=holed, CAPPED=cap is not None,
        BACKWARD=back, WIDE=aux is not None, num_warps=shape.warps, num_stages=shape.stages,
    )


def _over_queries(q, k, v, d_out, lse, aux, delta, dk, dv, places: Places, scale: float, cap: float | None) -> None:
    """dK and dV, those of all keys that have a place."""
    (b, h, n, d), size, listed = q.shape, v.shape[-1], places.k_order.shape[2]
    if not listed:
        return
    wide = max(power(d), power(size))
    shape, step = turned_shape(q.dtype, wide), turned_keys(q.dtype, wide, TILE)
    first, last = _queries(places, step)
    kernels.over_queries[(first.shape[-1], h, b)](
        q, k, v, d_out, lse, q if aux is None else aux, delta, dk, dv, *_lists(places, q), first, last,
        scale, cap or 1.0, h, h // k.shape[1], n, listed, *strides(q, k, v, d_out, dk, dv), *_lined(places),
        *lined(first), D=d, DVS=size, BD=power(d), BDV=power(size), BM=shape.step, BN=step,
        HOLED=places.hole_low is not None, CAPPED=cap is not None, WIDE=aux is not None,
        num_warps=shape.warps, num_stages=shape.stages,
    )


def _lists(p: Places, nothing: Tensor) -> list[Tensor]:
    return [nothing if x is None else x for x in (p.q_order, p.k_order, p.low, p.high, p.hole_low, p.hole_high)]


def _lined(p: Places) -> list[int]:
    return [*lined(p.q_order), *lined(p.k_order), *lined(p.low)]


def _queries(p: Places, step: int) -> tuple[Int[Tensor, "b h t"], Int[Tensor, "b h t"]]:
    """The queries, as places, that may see each tile of `step` keys: [first, last)."""
    listed = p.k_order.shape[2]
    tile = (steps(-(-listed // step), p.low.device) * step).int().expand(*p.low.shape[:2], -1).contiguous()
    first = torch.searchsorted(p.high, tile, right=True, out_int32=True)
    return first, torch.searchsorted(p.low, (tile + step).clamp(max=listed) - 1, right=True, out_int32=True)
