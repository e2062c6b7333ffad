"""The forward kernel for a grid in the form that Triton specialises by warp on Hopper: one group loads, two compute.

Not causal, heads of 64 to 128 (in steps of 8) in 16 bits, boxes of 128 queries by 128 or 64 keys. As in the form for
lists the compiler asks for one loop without a branch, so every step has the mask; here that is one operation and a
choice a pair. Each row has a bit for each coordinate that it sees in a step's box, each key one for each of its own:

    seen = (bits of the key and not bits of the row) == 0.

Keys and values come by descriptors of the grid, from where they lie, dilation and all; what is beside the grid is zero.
Only the queries are copied into the order of their boxes: the compiler halves their tile, and fails on a box of it. The
first use of each form on a device computes a small case by this kernel and by the plain one.
"""

from __future__ import annotations

import functools
import logging
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core import rng
from saccade.ops.attend.triton.grid import Cells, Grid, kernels
from saccade.ops.attend.triton.grid.kernels import described, local, own, reach, steps
from saccade.ops.attend.triton.hopper import LN2, LOG2E, TILE, scratch
from saccade.ops.attend.triton.hopper import described as even

_log = logging.getLogger("saccade")

STEP = 128  # keys
SIZES = (64, 128)  # of a head, least and largest
BITS = 30  # coordinates of a box that a row has bits for


@triton.jit
def _bits(first, last, start, STEP: tl.constexpr):
    """Of the cells from `start` on, those from first to last."""
    one = tl.full(first.shape, 1, tl.int32)
    begin = tl.minimum(tl.maximum(first - start, 0), STEP)
    end = tl.minimum(tl.maximum(last + 1 - start, 0), STEP)
    return (one << end) - (one << begin)


@triton.jit
def _forward(
    Q,  # [b h boxes*BM d]
    K,
    V,
    OUT,
    LSE,
    scale,
    heads,
    group,
    apart,  # 0
    size_z, size_y, size_x,
    wide_z, wide_y, wide_x,
    gap_z, gap_y, gap_x,
    q_b, q_h,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    out_b, out_h, out_n,
    D: tl.constexpr,
    BD: tl.constexpr,
    BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,  # box of queries
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,  # box of keys of a step
    AXES: tl.constexpr,
    ALL: tl.constexpr,  # there are bits enough for the last axis too
    SPECIAL: tl.constexpr,
):
    """A box of queries of one head; the heads of a group are neighbours."""
    BM: tl.constexpr = BZ * BY * BX
    BN: tl.constexpr = SZ * SY * SX
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = (kv * group + tl.program_id(0) % group).to(tl.int64)
    tile = tl.program_id(0) // group
    rest_x, cells_x, at_x, more = own(tile, size_x, gap_x, BX)
    rest_y, cells_y, at_y, more = own(more, size_y, gap_y, BY)
    rest_z, cells_z, at_z, _ = own(more, size_z, gap_z, BZ)
    z, y, x = local(tl.arange(0, BM), BY, BX)
    z += at_z
    y += at_y
    x += at_x
    alive = (z < cells_z) & (y < cells_y) & (x < cells_x)
    row = ((z * gap_z + rest_z) * size_y + y * gap_y + rest_y) * size_x + x * gap_x + rest_x
    z0, z1 = reach(z, cells_z, wide_z, False)
    y0, y1 = reach(y, cells_y, wide_y, False)
    x0, x1 = reach(x, cells_x, wide_x, False)
    low_z, nz, _, _ = steps(at_z, cells_z, wide_z, BZ, SZ, False, False)
    low_y, ny, _, _ = steps(at_y, cells_y, wide_y, BY, SY, False, False)
    low_x, nx, _, _ = steps(at_x, cells_x, wide_x, BX, SX, False, False)
    n_z, n_y, n_x = local(tl.arange(0, BN), SY, SX)
    d = tl.arange(0, BD)
    bit = 1 << n_y
    if AXES == 3:
        bit = bit | (1 << (SY + n_z))
    if ALL:
        bit = bit | (1 << (SY + SZ + n_x))

    first = ((rest_z * size_y + rest_y) * size_x + rest_x).to(tl.int64)
    k_of = described(K + b * k_b + kv.to(tl.int64) * k_h + first * k_n, cells_z, cells_y, cells_x, size_y, size_x,
                     gap_z, gap_y, gap_x, k_n, D, SZ, SY, SX, BD)
    v_of = described(V + b * v_b + kv.to(tl.int64) * v_h + first * v_n, cells_z, cells_y, cells_x, size_y, size_x,
                     gap_z, gap_y, gap_x, v_n, D, SZ, SY, SX, BD)
    Q += b * q_b + head * q_h
    rows = tl.num_programs(0) // group * BM
    q_of = tl.make_tensor_descriptor(Q, shape=[rows, D], strides=[D, 1], block_shape=[BM, BD])
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    unit = scale * LOG2E
    # j // n as the upper half of 2 j ceil(2^31 / n): right for j n < 2^31
    by_x = (tl.full([], 0x7FFFFFFF, tl.int32) // nx).to(tl.uint32) + 1
    by_y = (tl.full([], 0x7FFFFFFF, tl.int32) // ny).to(tl.uint32) + 1
    # `apart`: see the form for lists
    q = q_of.load([apart + tile * BM, 0])
    zero = tl.zeros([], tl.int32)
    for j in tl.range(0, nz * ny * nx, 1, warp_specialize=SPECIAL):
        i = zero + j
        p_y = tl.umulhi((i * 2).to(tl.uint32), by_x).to(tl.int32)
        s_x = low_x + (i - p_y * nx) * SX
        s_z = 0
        if AXES == 3:
            p_z = tl.umulhi((p_y * 2).to(tl.uint32), by_y).to(tl.int32)
            p_y -= p_z * ny
            s_z = low_z + p_z * SZ
        s_y = low_y + p_y * SY
        k = k_of.load([s_z, s_y, s_x, 0]).reshape([BN, BD]).T
        s = tl.dot(q, k)
        bits = _bits(y0, y1, s_y, SY)
        if AXES == 3:
            bits = bits | (_bits(z0, z1, s_z, SZ) << SY)
        if ALL:
            bits = bits | (_bits(x0, x1, s_x, SX) << (SY + SZ))
        seen = (bit[None, :] & ~bits[:, None]) == 0
        if not ALL:
            seen = seen & (n_x[None, :] >= (x0 - s_x)[:, None]) & (n_x[None, :] <= (x1 - s_x)[:, None])
        s = tl.where(seen, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1) * unit)
        base = tl.where(top == -float("inf"), 0.0, top)
        p = tl.math.exp2(s * unit - base[:, None])
        shrink = tl.math.exp2(m - base)
        acc = acc * shrink[:, None]
        v = v_of.load([s_z, s_y, s_x, 0]).reshape([BN, BD])
        acc = tl.dot(p.to(OUT.dtype.element_ty), v, acc)
        l = l * shrink + tl.sum(p, 1)
        m = top
    at = row.to(tl.int64)
    l = tl.where(alive, l, 1.0)
    acc = acc / l[:, None]
    place = OUT + b * out_b + head * out_h + (at * out_n)[:, None] + d[None, :]
    tl.store(place, acc.to(OUT.dtype.element_ty), mask=alive[:, None] & (d < D)[None, :])
    lse = (m + tl.math.log2(l)) * LN2
    tl.store(LSE + (b * heads + head) * (size_z * size_y * size_x) + at, lse, mask=alive)


def fits(q: Tensor, k: Tensor, v: Tensor, grid: Grid, cap: float | None) -> bool:
    """Whether this form can compute it, and is right on this device."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    size = q.shape[-1]
    sizes = SIZES[0] <= size <= SIZES[1] and size % 8 == 0 and size == v.shape[-1]
    if q.dtype not in (torch.float16, torch.bfloat16) or not sizes or cap is not None or grid.causal:
        return False
    box, step = boxes(grid, STEP)
    if grid.tokens < TILE or sum(step[:2]) > BITS or not all(map(even, (k, v))):
        return False
    return right(q.device, q.dtype, size, grid.axes, box, step)


def boxes(grid: Grid, step: int) -> tuple[Cells, Cells]:
    """Of queries, and of the keys of a step."""
    return grid.box(TILE), grid.box(step)


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grid: Grid, scale: float,
    shape: tuple[Cells, Cells] | None = None,
) -> None:  # fmt: skip
    """Into out and lse. `shape`: boxes other than those of `boxes`."""
    (b, h, _, d), g = q.shape, k.shape[1]
    box, step = boxes(grid, STEP) if shape is None else shape
    q, tiles = in_boxes(q, grid, box), grid.tiles(box)
    triton.set_allocator(scratch)  # for the descriptors that the kernel makes
    _forward[(tiles * (h // g), g, b)](
        q, k, v, out, lse, scale, h, h // g, 0, *grid.size, *grid.wide, *grid.gap,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        D=d, BD=1 << (d - 1).bit_length(), BZ=box[0], BY=box[1], BX=box[2], SZ=step[0], SY=step[1], SX=step[2],
        AXES=grid.axes, ALL=sum(step) <= BITS, SPECIAL=True, num_warps=4, num_stages=2,
    )


def in_boxes(q: Tensor, grid: Grid, box: Cells) -> Tensor:
    """The queries in the order of their boxes [b h boxes*cells d]."""
    b, h, _, d = q.shape
    tiles = grid.tiles(box)
    copy = q.new_empty(b, h, tiles * math.prod(box), d)
    kernels.copied[(tiles, h, b)](
        q, copy, *grid.size, *grid.gap, *q.stride()[:3], *copy.stride()[:2],
        D=d, BD=1 << (d - 1).bit_length(), BZ=box[0], BY=box[1], BX=box[2],
    )
    return copy


@functools.cache
def right(device: torch.device, dtype: torch.dtype, size: int, axes: int, box: Cells, step: Cells) -> bool:
    """Whether it agrees with the plain kernel on a small case on this device; a warning says if it does not."""
    from saccade.ops.attend.triton.grid import launch

    draw = rng.generator("ops/attend/triton/grid/hopper")
    grid = _small(axes)
    q, k, v = (torch.randn(1, h, grid.tokens, size, generator=draw).to(device, dtype) for h in (4, 2, 2))
    plain, plain_lse, _ = launch.forward(q, k, v, grid, size**-0.5, None, special=False)
    out, lse = torch.full_like(plain, torch.nan), torch.full_like(plain_lse, torch.nan)
    try:
        forward(q, k, v, out, lse, grid, size**-0.5, (box, step))
        off = max(float((x - y).abs().nan_to_num(torch.inf).max()) for x, y in ((out, plain), (lse, plain_lse)))
    except Exception as broken:  # whatever a compiler throws
        off = broken
    if isinstance(off, float) and off <= 8 * torch.finfo(dtype).eps:
        return True
    what = f"is off by {off:.2g} on a small case" if isinstance(off, float) else f"failed: {off}"
    _log.warning(
        "attend on a grid: the warp-specialised kernel (%s, heads of %d, boxes of %s by %s) %s on %s; the plain "
        "one is used, which is slower",
        str(dtype).split(".")[-1], size, box, step, what, torch.cuda.get_device_name(device),
    )
    return False


def _small(axes: int) -> Grid:
    """Sides that are no whole boxes, more than one step, two remainders along the last axis."""
    size = {1: (1, 1, 901), 2: (1, 37, 49), 3: (7, 11, 21)}[axes]
    wide = {1: (1, 1, 200), 2: (1, 22, 15), 3: (4, 7, 8)}[axes]
    return Grid(size, wide, (1, 1, 2), causal=False)
