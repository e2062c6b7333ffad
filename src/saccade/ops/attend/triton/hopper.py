"""The forward kernel in the one form that Triton specialises by warp on Hopper: one group loads, and two compute.

Blocks and spans, heads of 64 or 128 in 16 bits, tiles of 128 x 128 only. What the compiler asks for (3.6): tensor
descriptors, 4 warps, one loop and no branch in it, no product outside it; so every step has the mask, an interval of
keys for each row. The queries' descriptor must be made in the kernel: the compiler halves its tile, one for each group,
and a descriptor from the host brings twice the bytes that are waited for: the kernel never ends. Other tile shapes have
been seen to give NaN, so the first use on a device computes a small case by this kernel and by the plain one.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.core import rng
from saccade.ops.attend.triton.lists import Lists

_log = logging.getLogger("saccade")

TILE = 128
SIZES = (64, 128)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _forward(
    Q,
    K,  # descriptors of [b g k d], in tiles [1 1 BN D]
    V,
    OUT,
    LSE,
    CROW,
    COL,
    SINKS,
    WINDOW,
    scale,
    heads,
    group,
    queries,
    keys,
    q_b, q_h, q_n,
    out_b, out_h, out_n,
    crow_b, crow_h,
    col_b, col_h,
    span_h,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SUB: tl.constexpr,
    WIDTH: tl.constexpr,
    SPANS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPECIAL: tl.constexpr,
):
    """One tile of queries of one head; the heads of a group are neighbours."""
    x = tl.program_id(0)
    kv = tl.program_id(1)
    b = tl.program_id(2)
    tile = tl.num_programs(0) // group - 1 - x // group
    head = kv * group + x % group
    offset = keys - queries
    row = tile * BM + tl.arange(0, BM)
    position = row + offset
    n = tl.arange(0, BN)
    d = tl.arange(0, D)
    R: tl.constexpr = WIDTH // BN
    if CAUSAL:
        last = position
        before = tl.minimum(tile * BM + BM, queries) + offset
    else:
        last = tl.zeros([BM], tl.int32) + (keys - 1)
        before = keys
    if SPANS:
        window = tl.load(WINDOW + head * span_h)
        sinks = tl.minimum(tl.load(SINKS + head * span_h), before)
        sunk = (sinks + BN - 1) // BN
        low = tl.maximum(tl.maximum(tile * BM + offset - window + 1, sinks), 0) // BN
        steps = sunk + tl.maximum((before + BN - 1) // BN - low, 0)
        lists = COL
    else:
        block = tile // SUB
        crow = CROW + b.to(tl.int64) * crow_b + head.to(tl.int64) * crow_h + block
        first = tl.load(crow)
        steps = (tl.load(crow + 1) - first) * R
        lists = COL + b.to(tl.int64) * col_b + head.to(tl.int64) * col_h + first
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    unit = scale * LOG2E
    q_head = Q + b.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    q_of = tl.make_tensor_descriptor(q_head, shape=[queries, D], strides=[q_n, 1], block_shape=[BM, D])
    q = q_of.load([tile * BM, 0])
    for j in tl.range(0, steps, 1, warp_specialize=SPECIAL):
        if SPANS:  # the sinks by themselves, and then what the window has beside them
            start = tl.where(j < sunk, j, j - sunk + low) * BN
            upper = tl.where(j < sunk, tl.minimum(last, sinks - 1), last) - start
            lower = tl.where(j < sunk, -1, tl.maximum(position - window, sinks - 1)) - start
        else:
            start = tl.load(lists + j // R) * WIDTH + (j % R) * BN
            upper = last - start
        k = K.load([b, kv, start, 0]).reshape([BN, D]).T
        s = tl.dot(q, k)
        if SPANS:
            s = tl.where((n[None, :] <= upper[:, None]) & (n[None, :] > lower[:, None]), s, -float("inf"))
        else:
            s = tl.where(n[None, :] <= upper[:, None], s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1) * unit)
        base = tl.where(top == -float("inf"), 0.0, top)
        p = tl.math.exp2(s * unit - base[:, None])
        shrink = tl.math.exp2(m - base)
        acc = acc * shrink[:, None]
        v = V.load([b, kv, start, 0]).reshape([BN, D])
        acc = tl.dot(p.to(OUT.dtype.element_ty), v, acc)
        l = l * shrink + tl.sum(p, 1)
        m = top
    some = l != 0
    alive = row < queries
    acc = acc / tl.where(some, l, 1.0)[:, None]
    out = OUT + b.to(tl.int64) * out_b + head.to(tl.int64) * out_h + row.to(tl.int64)[:, None] * out_n + d[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=alive[:, None])
    lse = tl.where(some, (m + tl.math.log2(tl.where(some, l, 1.0))) * LN2, -float("inf"))
    tl.store(LSE + (b.to(tl.int64) * heads + head) * queries + row, lse, mask=alive)


def fits(q: Tensor, k: Tensor, v: Tensor, part: Lists, cap: float | None) -> bool:
    """Whether this form can compute it, and is right on this device."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] not in SIZES or q.shape[-1] != v.shape[-1]:
        return False
    if cap is not None or part.heads is not None or part.index is not None or not all(map(_described, (q, k, v))):
        return False
    spans = part.sinks is not None and part.causal
    blocks = part.crow is not None and part.q_block % TILE == 0 and part.width % TILE == 0
    return (spans or blocks) and q.shape[2] >= TILE and right(q.device, q.dtype, q.shape[-1], spans)


def _described(x: Tensor) -> bool:
    """Whether a tensor descriptor can say where it lies: rows of whole 16 bytes."""
    even = all(n * x.element_size() % 16 == 0 and n for n, size in zip(x.stride()[:3], x.shape) if size > 1)
    return even and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor) -> TensorDescriptor:
    strides = [s if n > 1 else x.shape[-1] * 8 for s, n in zip(x.stride()[:3], x.shape)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, TILE, x.shape[-1]])


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Lists, scale: float) -> None:
    """Into out and lse."""
    (b, h, n, d), g = q.shape, k.shape[1]
    lists = [(x, [0 if x is None or x.shape[i] == 1 else x.stride(i) for i in (0, 1)]) for x in (part.crow, part.col)]
    pointers = [part.crow, part.col, part.sinks, part.window]
    triton.set_allocator(_scratch)  # for the descriptor that the kernel makes
    _forward[(triton.cdiv(n, TILE) * (h // g), g, b)](
        q, *map(_descriptor, (k, v)), out, lse, *(lse if x is None else x for x in pointers),
        scale, h, h // g, n, part.keys, *q.stride()[:3], *out.stride()[:3],
        *(s for _, strides in lists for s in strides),
        0 if part.sinks is None or len(part.sinks) == 1 else 1,
        D=d, BM=TILE, BN=TILE, SUB=max(1, part.q_block // TILE), WIDTH=max(TILE, part.width),
        SPANS=part.sinks is not None, CAUSAL=part.causal, SPECIAL=True, num_warps=4, num_stages=2,
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def right(device: torch.device, dtype: torch.dtype, size: int, spans: bool) -> bool:
    """Whether it agrees with the plain kernel on a small case on this device; a warning says if it does not."""
    from saccade.ops.attend.triton import launch

    draw = rng.generator("ops/attend/triton/hopper")
    q, k, v = (torch.randn(1, h, 900, size, generator=draw).to(device, dtype) for h in (2, 1, 1))
    part = _small(device, spans)
    plain, plain_lse, _ = launch.forward(q, k, v, [part], size**-0.5, None, special=False)
    out, lse = torch.full_like(plain, torch.nan), torch.full_like(plain_lse, torch.nan)
    try:
        forward(q, k, v, out, lse, part, size**-0.5)
        off = max(float((out - plain).abs().max()), float((lse - plain_lse).abs().max()))
    except Exception as broken:  # whatever a compiler throws
        off = broken
    if isinstance(off, float) and off <= 8 * torch.finfo(dtype).eps:
        return True
    found = f"is off by {off:.2g} on a small case" if isinstance(off, float) else f"failed: {off}"
    _log.warning(
        "attend: the warp-specialised kernel (%s, heads of %d) %s on %s; the plain one is used, which is slower",
        str(dtype).split(".")[-1], size, found, torch.cuda.get_device_name(device),
    )
    return False


def _small(device: torch.device, spans: bool) -> Lists:
    shape = {"causal": True, "queries": 900, "keys": 900, "q_block": TILE}
    if spans:
        sinks, window = (torch.tensor([n], dtype=torch.int32, device=device) for n in (5, 300))
        return Lists(sinks=sinks, window=window, **shape)
    rows = [[*range(0, i, 2), i] for i in range(8)]
    crow = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int().to(device)[None, None]
    col = torch.tensor([c for r in rows for c in r], dtype=torch.int32, device=device)[None, None]
    return Lists(crow=crow, col=col, step=TILE, width=TILE, **shape)
