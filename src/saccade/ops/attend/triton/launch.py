"""Which shape of kernel runs, and the launches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from saccade.ops.attend.triton import hopper, hopper_backward, kernels
from saccade.ops.attend.triton.lists import FEWEST, MOST, TILE, Lists, apart, lined, pieces, steps, strides, turned

SPECIAL = True  # the warp-specialised form, where it fits and is right


@dataclass(frozen=True)
class Shape:
    """Of a kernel: keys (for dK and dV queries) of a step, warps, how many steps are loaded ahead, and registers of a
    thread at most (None: what the compiler takes)."""

    step: int
    warps: int
    stages: int
    registers: int | None = None


def power(n: int) -> int:
    """The power of two that holds n, and a product takes."""
    return max(FEWEST, 1 << (n - 1).bit_length())


def forward_shape(dtype: torch.dtype, size: int, rows: int, runs: int, single: bool = False) -> Shape:
    """`runs`: keys that follow on one another; `single`: all come one by one. On an H200, 16 bits and heads of 128,
    these were the fastest of those tried: one to three for each branch, thirteen for `single`, which waits for memory
    and is faster with two programs on a multiprocessor. Float32 and heads above 128 were not timed, only made to fit.
    """
    if dtype == torch.float32:
        return Shape(32 if size <= 128 else 16, 4, 1)
    if size > 128:
        return Shape(32 if rows <= 64 else 64, 4 if rows <= 64 else 8, 2)
    if rows <= 64:
        return Shape(64, 4, 3)
    if single:
        return Shape(32, 8, 3, registers=128)
    if runs % 128 == 0:
        return Shape(128, 8, 2)
    return Shape(64, 8, 2 if runs % 64 == 0 else 3)


def backward_shape(dtype: torch.dtype, size: int, rows: int) -> Shape:
    """Of the kernel for dQ. Timed with 128 rows of 16 bits and heads of 128: 3 stages are no faster."""
    if dtype == torch.float32:
        return Shape(32 if size <= 128 else 16, 4, 1)
    if size > 128:
        return Shape(32, 8, 1)
    return Shape(64, 4 if rows <= 64 else 8, 2)


def turned_shape(dtype: torch.dtype, size: int) -> Shape:
    """Of the kernel for dK and dV; step: queries. In 16 bits, heads of 128: the fastest of four, with `turned_keys`."""
    if dtype == torch.float32:
        return Shape(32 if size <= 128 else 16, 4, 1)
    if size > 128:
        return Shape(32, 8, 1)
    return Shape(64, 4, 2)


def turned_keys(dtype: torch.dtype, size: int, block: int) -> int:
    """Keys of a program that sums up dK and dV."""
    if dtype == torch.float32:
        return 32
    return min(block, 64)


def forward(
    q: Tensor, k: Tensor, v: Tensor, parts: list[Lists], scale: float, cap: float | None, special: bool | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, lse in float32, and in float32 its two halves [2 b h q]. `special`: by the warp-specialised form where it
    fits."""
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    aux = torch.empty(2, *lse.shape, dtype=torch.float32, device=q.device) if q.dtype == torch.float32 else None
    special = SPECIAL if special is None else special
    for part in parts:
        if special and hopper.fits(q, k, v, part, scale, cap):
            hopper.forward(q, k, v, out, lse, part, scale)
            if part.index is not None:  # beside the runs: single keys, on top of what is there
                rest = dataclasses.replace(part, count=None, col=None)
                _over_keys(q, k, v, None, out, lse, None, None, None, None, rest, scale, cap, start=True)
        else:
            _over_keys(q, k, v, None, out, lse, aux, None, None, None, part, scale, cap)
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
    parts: list[Lists],
    scale: float,
    cap: float | None,
    special: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    delta, base = row_sums(out, d_out, lse, d_lse)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    alone = len(parts) == 1 and parts[0].turnable
    make = torch.empty if alone else torch.zeros
    dk, dv = (make(x.shape, dtype=x.dtype if alone else torch.float32, device=x.device) for x in (k, v))
    special = SPECIAL if special is None else special
    for part in parts:
        if special and alone and hopper_backward.fits(q, k, v, d_out, part, scale, cap):
            hopper_backward.onto_queries(q, k, v, d_out, base, delta, dq, part, scale)
            hopper_backward.onto_keys(q, k, v, d_out, base, delta, dk, dv, part, scale)
            continue
        onto = None if part.turnable else (dk, dv)
        _over_keys(q, k, v, d_out, dq, base, aux, delta, *(onto or (None, None)), part, scale, cap)
        if part.turnable:
            mine = (dk, dv) if alone else tuple(torch.empty_like(x) for x in (dk, dv))
            _over_queries(q, k, v, d_out, base, aux, delta, *mine, part, scale, cap)
            if not alone:
                dk += mine[0]
                dv += mine[1]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _over_keys(
    q, k, v, d_out, out, lse, aux, delta, dk, dv, part: Lists, scale: float, cap: float | None, start: bool = False
) -> None:
    """Forward into out and lse, on top of what they hold if `start`; with d_out dQ into out, and with dk and dv those
    too, added up atomically."""
    (b, h, n, d), g, size = q.shape, k.shape[1], v.shape[-1]
    if not b or not n or not h:
        return
    group, rows = h // g, part.rows
    height = power(rows * part.pack)
    back = d_out is not None
    wide = max(power(d), power(size))
    along = part.width if part.sinks is None else MOST
    others = part.col, part.bits, part.ranges, part.sinks
    single = part.index is not None and not start and all(x is None for x in others)
    shape = backward_shape(q.dtype, wide, height) if back else forward_shape(q.dtype, wide, height, along, single)
    limits = {} if shape.registers is None else {"maxnreg": shape.registers}
    runs = 0 if part.col is None else (1 if part.width % shape.step == 0 else 2)
    sub, blocks = -(-part.q_block // rows), -(-n // part.q_block)
    mapped = part.heads is not None
    slots = 1 if mapped else -(-group // part.pack)
    grid = (blocks * sub * slots, len(part.heads) if mapped else g, b)
    nothing = q
    begins = part.crow if part.count is None else part.count
    pointers = [part.heads, begins, part.col, part.index, part.bits, part.ranges, part.sinks, part.window]
    kernels.over_keys[grid](
        q, k, v, d_out if back else nothing, out, lse, nothing if aux is None else aux, delta if back else nothing,
        *(nothing if x is None else x for x in (dk, dv)),
        *(nothing if x is None else x for x in pointers),
        scale, cap or 1.0, h, group, n, part.keys, part.q_block, blocks,
        part.index.shape[-1] if part.index is not None else 0,
        part.ranges.shape[-2] if part.ranges is not None else 0,
        *strides(q, k, v, d_out, out, dk, dv),
        *lined(begins), *lined(part.col), part.col.stride(2) if part.col is not None else 0,
        *lined(part.index, 3), *lined(part.bits, 3), *lined(part.ranges, 3),
        0 if part.sinks is None or len(part.sinks) == 1 else 1,
        D=d, DVS=size, BD=power(d), BDV=power(size), BM=height, BN=shape.step, ROWS=rows, PACK=part.pack,
        SLOTS=slots, SUB=sub, RUNS=runs, STEP=part.step, WIDTH=part.width, CSR=part.crow is not None,
        COLUMNS=part.index is not None, MARKED=part.bits is not None, RANGED=part.ranges is not None,
        SPANS=part.sinks is not None, CAUSAL=part.causal, CAPPED=cap is not None, MAPPED=mapped, BACKWARD=back,
        ATOMIC=dk is not None, WIDE=aux is not None, START=start, num_warps=shape.warps, num_stages=shape.stages,
        **limits,
    )


def row_sums(
    out: Tensor, d_out: Tensor, lse: Float[Tensor, "b h q"], d_lse: Float[Tensor, "b h q"]
) -> tuple[Float[Tensor, "b h q"], Float[Tensor, "b h q"]]:
    """delta, and lse as the kernels take it off."""
    delta, base = (torch.empty(out.shape[:3], dtype=torch.float32, device=out.device) for _ in range(2))
    b, h, n, size = out.shape
    if delta.numel():
        kernels.row_sums[(triton.cdiv(n, 64), h, b)](
            out, d_out, lse, d_lse.contiguous(), delta, base, h, n, *strides(out, d_out),
            DVS=size, BDV=power(size), BM=64,
        )
    return delta, base


def _over_queries(q, k, v, d_out, lse, aux, delta, dk, dv, part: Lists, scale: float, cap: float | None) -> None:
    """dK and dV, written whole."""
    (b, h, n, d), (_, g, keys, size) = q.shape, v.shape
    if not b or not keys:
        return
    spans = part.sinks is not None
    wide = max(power(d), power(size))
    block = 128 if spans else part.width
    shape, high = turned_shape(q.dtype, wide), turned_keys(q.dtype, wide, block if block % 128 == 0 else TILE)
    mapped = part.heads is not None
    lines = len(part.heads) if mapped else h
    first = _first(part.heads, h // g, g) if mapped else steps(g + 1, q.device) * (h // g)
    crow, row = (None, None) if spans else turned(part)
    cut, parts, grid = None, None, (triton.cdiv(keys, high), g, b)
    if not spans:
        cut = pieces(crow, first, lines, row.shape[-1])
        parts = torch.empty(b * cut.places * block * (power(d) + power(size)), dtype=torch.float32, device=q.device)
        grid = (cut.rows.shape[1] * (block // high), 1, b)
    described = _described(q, d_out, lse)
    told = (q, d_out, lse, delta)
    if described:
        told = tuple(hopper.descriptor(x, shape.step) for x in told)
    nothing = q
    kernels.over_queries[grid](
        told[0], k, v, told[1], told[2], nothing if aux is None else aux, told[3], dk, dv,
        *(nothing if x is None else x for x in (part.heads, first if mapped else None, crow, row)),
        *(nothing if x is None else x for x in (cut and cut.rows, parts, part.sinks, part.window)),
        apart(cut and cut.rows), cut.places if cut else 0, cut.most if cut else 0,
        scale, cap or 1.0, h, h // g, n, keys, *strides(q, k, v, d_out, dk, dv),
        *lined(crow), *lined(row), 0 if not spans or len(part.sinks) == 1 else 1,
        D=d, DVS=size, BD=power(d), BDV=power(size), BM=shape.step, BN=high, Q_BLOCK=part.q_block, K_BLOCK=block,
        SPANS=spans, CAUSAL=part.causal, CAPPED=cap is not None, MAPPED=mapped, WIDE=aux is not None,
        DESCRIBED=described, num_warps=shape.warps, num_stages=shape.stages,
    )
    if cut:
        kernels.joined[(cut.of.shape[1], block // 32, b)](
            dk, dv, parts, cut.of, apart(cut.of), cut.places, scale, keys, *strides(dk, dv),
            D=d, DVS=size, BD=power(d), BDV=power(size), BN=high, K_BLOCK=block, STEP=32,
        )


def _described(q: Tensor, d_out: Tensor, lse: Tensor) -> bool:
    """Whether the queries of dK and dV come by tensor descriptors: whole tiles, without a mask."""
    if not q.is_cuda or torch.version.hip or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    sizes = all(x.shape[-1] == power(x.shape[-1]) for x in (q, d_out))
    return q.dtype != torch.float32 and sizes and all(map(hopper.described, (q, d_out, lse)))


def _first(heads: Tensor, group: int, kv_heads: int) -> Tensor:
    """Where the heads of each key/value head begin."""
    edges = torch.arange(kv_heads + 1, device=heads.device, dtype=heads.dtype) * group
    return torch.searchsorted(heads, edges, out_int32=True)
