"""The backward kernels in the form that Triton specialises by warp on Hopper (see hopper.py): dQ, and dK with dV.

Blocks, heads of 64 or 128 in 16 bits. What a tile owns comes by a descriptor that the kernel makes, what it walks over
by one of the host. The compiler takes a plain load of a row's sums for a tile that is to be brought by the loading
group, and fails: `_value` hides it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core import rng
from saccade.ops.attend.triton import hopper, kernels
from saccade.ops.attend.triton.hopper import HIDDEN, LOG2E, TILE, _excess
from saccade.ops.attend.triton.lists import MEMBER, Lists, apart, lined, pieces, steps, strides, turned

_log = logging.getLogger("saccade")

STEP = 64  # keys of a step of dQ, and queries of a step of dK and dV: with 128 both spill
OF_HEAD = tl.constexpr(MEMBER)


@triton.jit
def _value(at, there):
    """Of a float32 in memory; inf where there is none."""
    code: tl.constexpr = """
    {
        .reg .pred p;
        mov.f32 $0, 0f7F800000;
        setp.ne.s32 p, $2, 0;
        @p ld.global.f32 $0, [$1];
    }
    """
    return tl.inline_asm_elementwise(code, "=f,l,r", [at.to(tl.int64), there.to(tl.int32)], tl.float32, True, 1)


@triton.jit
def _onto_queries(
    Q,
    DO,
    K,  # descriptors of [b g k d], in tiles [1 1 BN D]
    V,
    LSE,  # in units of log 2
    DELTA,
    DQ,
    CROW,
    COL,
    scale,
    heads,
    group,
    queries,
    keys,
    q_apart,  # 0: see hopper.py; one for each tile, or the second group's would be moved on twice
    do_apart,
    q_b, q_h, q_n,
    do_b, do_h, do_n,
    dq_b, dq_h, dq_n,
    crow_b, crow_h,
    col_b, col_h,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SUB: tl.constexpr,  # tiles of a query block
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPECIAL: tl.constexpr,
):
    """dQ of some queries of a head; the heads of a group are neighbours."""
    x = tl.program_id(0)
    kv = tl.program_id(1)
    b = tl.program_id(2)
    tile = tl.num_programs(0) // group - 1 - x // group
    head = kv * group + x % group
    row = tile * BM + tl.arange(0, BM)
    alive = row < queries
    n = tl.arange(0, BN).to(tl.float32)
    d = tl.arange(0, D)
    R: tl.constexpr = WIDTH // BN
    if CAUSAL:
        last = row + (keys - queries)
    else:
        last = tl.zeros([BM], tl.int32) + (keys - 1)
    crow = CROW + b.to(tl.int64) * crow_b + head.to(tl.int64) * crow_h + tile // SUB
    first = tl.load(crow)
    many = (tl.load(crow + 1) - first) * R
    lists = COL + b.to(tl.int64) * col_b + head.to(tl.int64) * col_h + first
    at = (b * heads + head).to(tl.int64) * queries + row
    lse = _value(LSE + at, alive)
    delta = _value(DELTA + at, alive)
    acc = tl.zeros([BM, D], tl.float32)
    unit = scale * LOG2E
    q_tiles = Q + b.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    do_tiles = DO + b.to(tl.int64) * do_b + head.to(tl.int64) * do_h
    q_of = tl.make_tensor_descriptor(q_tiles, shape=[queries, D], strides=[q_n, 1], block_shape=[BM, D])
    do_of = tl.make_tensor_descriptor(do_tiles, shape=[queries, D], strides=[do_n, 1], block_shape=[BM, D])
    q = q_of.load([q_apart + tile * BM, 0])
    do = do_of.load([do_apart + tile * BM, 0])
    for j in tl.range(0, many, 1, warp_specialize=SPECIAL):
        start = tl.load(lists + j // R) * WIDTH + (j % R) * BN
        k = K.load([b, kv, start, 0]).reshape([BN, D])
        v = V.load([b, kv, start, 0]).reshape([BN, D])
        s = tl.dot(q, k.T)
        s += _excess(n[None, :], (last - start).to(tl.float32)[:, None]) * HIDDEN
        p = tl.math.exp2(s * unit - lse[:, None])
        dp = tl.dot(do, v.T)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc)
    out = DQ + b.to(tl.int64) * dq_b + head.to(tl.int64) * dq_h + row.to(tl.int64)[:, None] * dq_n + d[None, :]
    tl.store(out, (acc * scale).to(DQ.dtype.element_ty), mask=alive[:, None])


@triton.jit
def _onto_keys(
    Q,  # descriptors of [b h q d], in tiles [1 1 BM D]
    DO,
    K,
    V,
    LSE,
    DELTA,
    DK,
    DV,
    FIRST,  # of CODE, for each key block
    CODE,  # head in the group * OF_HEAD + query block
    PIECES,  # [b pieces 3]: key block of a key/value head, first entry, place in PARTS
    PARTS,  # [b places 2 BN D]
    scale,
    heads,
    group,
    queries,
    keys,
    k_apart,  # 0
    v_apart,
    piece_b,
    places,
    most,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    dk_b, dk_h, dk_n,
    dv_b, dv_h, dv_n,
    first_b, first_h,
    code_b, code_h,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPECIAL: tl.constexpr,
):
    """dK and dV of a key block, over the query blocks of its group that look at it, or a piece of those."""
    b = tl.program_id(2)
    piece = PIECES + b.to(tl.int64) * piece_b + tl.program_id(0) * 3
    begin = tl.load(piece)
    entry = tl.load(piece + 1)
    place = tl.load(piece + 2)
    live = begin >= 0  # there is room for more pieces than there are
    begin = tl.maximum(begin, 0)
    key_blocks = (keys + BN - 1) // BN
    kv = begin // key_blocks
    n0 = begin % key_blocks * BN
    at = FIRST + b.to(tl.int64) * first_b + kv.to(tl.int64) * first_h + n0 // BN
    low = tl.load(at) + entry
    many = tl.minimum(tl.load(at + 1) - low, most)
    codes = CODE + b.to(tl.int64) * code_b + kv.to(tl.int64) * code_h + low
    key = n0 + tl.arange(0, BN)
    first_seen = (key - (keys - queries)).to(tl.float32)
    m = tl.arange(0, BM)
    d = tl.arange(0, D)
    k_tiles = K + b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v_tiles = V + b.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    k_of = tl.make_tensor_descriptor(k_tiles, shape=[keys, D], strides=[k_n, 1], block_shape=[BN, D])
    v_of = tl.make_tensor_descriptor(v_tiles, shape=[keys, D], strides=[v_n, 1], block_shape=[BN, D])
    k = k_of.load([k_apart + n0, 0])
    v = v_of.load([v_apart + n0, 0])
    d_k = tl.zeros([BN, D], tl.float32)
    d_v = tl.zeros([BN, D], tl.float32)
    unit = scale * LOG2E
    R: tl.constexpr = Q_BLOCK // BM
    for j in tl.range(0, tl.where(live, many * R, 0), 1, warp_specialize=SPECIAL):
        code = tl.load(codes + j // R)
        head = kv * group + code // OF_HEAD
        q0 = code % OF_HEAD * Q_BLOCK + (j % R) * BM
        row = (b * heads + head) * queries + q0 + m
        lse = _value(LSE + row, q0 + m < queries)
        delta = tl.where(q0 + m < queries, _value(DELTA + row, q0 + m < queries), 0.0)
        q = Q.load([b, head, q0, 0]).reshape([BM, D])
        do = DO.load([b, head, q0, 0]).reshape([BM, D])
        s = tl.dot(k, q.T)
        if CAUSAL:
            s += _excess(first_seen[:, None], (q0 + m).to(tl.float32)[None, :]) * HIDDEN
        p = tl.math.exp2(s * unit - lse[None, :])
        dp = tl.dot(v, do.T)
        d_v = tl.dot(p.to(do.dtype), do, d_v)
        ds = p * (dp - delta[None, :])
        d_k = tl.dot(ds.to(q.dtype), q, d_k)
    far = key.to(tl.int64)[:, None]
    alone = live & (place < 0) & (key < keys)[:, None]
    dk_at = DK + b.to(tl.int64) * dk_b + kv.to(tl.int64) * dk_h + far * dk_n + d[None, :]
    dv_at = DV + b.to(tl.int64) * dv_b + kv.to(tl.int64) * dv_h + far * dv_n + d[None, :]
    tl.store(dk_at, (d_k * scale).to(DK.dtype.element_ty), mask=alone)
    tl.store(dv_at, d_v.to(DV.dtype.element_ty), mask=alone)
    n = tl.arange(0, BN)[:, None]
    part = PARTS + (b.to(tl.int64) * places + place) * (2 * BN * D) + n * D + d[None, :]
    shared = live & (place >= 0) & (n >= 0)
    tl.store(part, d_k, mask=shared)
    tl.store(part + BN * D, d_v, mask=shared)


def fits(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, part: Lists, scale: float, cap: float | None) -> bool:
    """Whether these kernels can compute it, and are right on this device."""
    if not hopper.fits(q, k, v, part, scale, cap) or not hopper.described(d_out):
        return False
    blocks = part.crow is not None and part.q_block % TILE == 0 and part.step == part.width == TILE
    if not blocks or -(-part.queries // part.q_block) >= MEMBER:
        return False
    return right(q.device, q.dtype, q.shape[-1], part.causal)


def onto_queries(q, k, v, d_out, lse, delta, dq: Tensor, part: Lists, scale: float) -> None:
    """dQ, written whole."""
    (b, h, n, d), g = q.shape, k.shape[1]
    triton.set_allocator(hopper.scratch)
    _onto_queries[(triton.cdiv(n, TILE) * (h // g), g, b)](
        q, d_out, *(hopper.descriptor(x, STEP) for x in (k, v)), lse, delta, dq, part.crow, part.col,
        scale, h, h // g, n, part.keys, 0, 0, *strides(q, d_out, dq),
        *lined(part.crow), *lined(part.col),
        D=d, BM=TILE, BN=STEP, SUB=part.q_block // TILE, WIDTH=part.width, CAUSAL=part.causal, SPECIAL=True,
        num_warps=4, num_stages=2,
    )


def onto_keys(q, k, v, d_out, lse, delta, dk: Tensor, dv: Tensor, part: Lists, scale: float) -> None:
    """dK and dV, written whole."""
    (b, h, n, d), (g, keys) = q.shape, k.shape[1:3]
    first, code = turned(part, h, h // g)
    cut = pieces(first, steps(g + 1, q.device), g, code.shape[-1])
    parts = torch.empty(b * cut.places * 2 * TILE * d, dtype=torch.float32, device=q.device)
    triton.set_allocator(hopper.scratch)
    _onto_keys[(cut.rows.shape[1], 1, b)](
        *(hopper.descriptor(x, STEP) for x in (q, d_out)), k, v, lse, delta, dk, dv, first, code, cut.rows, parts,
        scale, h, h // g, n, keys, 0, 0, apart(cut.rows), cut.places, cut.most,
        *strides(k, v, dk, dv), *lined(first), *lined(code),
        D=d, BM=STEP, BN=TILE, Q_BLOCK=part.q_block, CAUSAL=part.causal, SPECIAL=True, num_warps=4, num_stages=2,
    )
    kernels.joined[(cut.of.shape[1], TILE // 32, b)](
        dk, dv, parts, cut.of, apart(cut.of), cut.places, scale, keys,
        *strides(dk, dv),
        D=d, DVS=d, BD=d, BDV=d, BN=TILE, K_BLOCK=TILE, STEP=32,
    )


@functools.cache
def right(device: torch.device, dtype: torch.dtype, size: int, causal: bool) -> bool:
    """Whether they agree with the plain kernels on a small case on this device; a warning says if they do not."""
    from saccade.ops.attend.triton import launch

    draw = rng.generator("ops/attend/triton/hopper_backward")
    part = dataclasses.replace(hopper.small(device, hopper.Form(TILE, 1, False)), causal=causal)
    q, k, v, d_out = (torch.randn(1, h, part.queries, size, generator=draw).to(device, dtype) for h in (4, 2, 2, 4))
    out, lse, _ = launch.forward(q, k, v, [part], size**-0.5, None, special=False)
    told = (q, k, v, out, lse, None, d_out, torch.zeros_like(lse), [part], size**-0.5, None)
    plain = launch.backward(*told, special=False)
    delta, base = launch.row_sums(out, d_out, lse, torch.zeros_like(lse))
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in plain)
    try:
        onto_queries(q, k, v, d_out, base, delta, dq, part, size**-0.5)
        onto_keys(q, k, v, d_out, base, delta, dk, dv, part, size**-0.5)
        ours = (dq, dk, dv)
        off = max(float(((x - y).norm() / y.norm()).nan_to_num(torch.inf)) for x, y in zip(ours, plain))
    except Exception as broken:  # whatever a compiler throws
        off = broken
    if isinstance(off, float) and off <= torch.finfo(dtype).eps:
        return True
    what = f"is off by {off:.2g} on a small case" if isinstance(off, float) else f"failed: {off}"
    _log.warning(
        "attend: the warp-specialised backward kernels (%s, heads of %d) %s on %s; the plain ones are used, slower",
        str(dtype).split(".")[-1], size, what, torch.cuda.get_device_name(device),
    )
    return False
