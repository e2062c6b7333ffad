"""The forward kernel in the one form that Triton specialises by warp on Hopper: one group loads, and two compute.

Blocks and spans, heads of 64 or 128 in 16 bits, tiles of 128 queries (or of 64 of two heads with the same lists) by 128
or 64 keys. What the compiler asks for (3.6): tensor descriptors, 4 warps, 2 stages (3 gave NaN), one loop and no branch
in it, no product outside it; so every step has the mask, an interval of keys for each row. It halves the queries' tile,
one half for each group. So their descriptor must be made in the kernel: one from the host brings twice the bytes that
are waited for, and the kernel never ends. The first use of each form on a device computes a small case by this kernel
and by the plain one.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.core import rng
from saccade.ops.attend.triton.lists import Lists, lined, strides

_log = logging.getLogger("saccade")

TILE = 128
SIZES = (64, 128)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1e30)  # added to a logit that is not seen: finite, for it is also multiplied by 0
SMALLEST = 1e-6  # scale with which that holds
LEAST = tl.constexpr(-1e20)  # what a row's largest logit begins with: above all that are hidden, under all that are not


@dataclass(frozen=True)
class Form:
    """Keys of a step; heads that a tile of queries is of; spans, or blocks; those in a table, with any first key."""

    step: int
    pack: int
    spans: bool
    table: bool = False


@triton.jit
def _excess(x, limit):
    """0 where x <= limit, else 1; of whole numbers. A comparison and a choice take about three times as long."""
    return tl.inline_asm_elementwise("sub.sat.f32 $0, $1, $2;", "=f,f,f", [x, limit], tl.float32, True, 1)


@triton.jit
def _forward(
    Q,  # where PACK > 1: [b h/PACK PACK*queries d], by tiles
    K,  # descriptors of [b g k d], in tiles [1 1 BN D]
    V,
    OUT,
    LSE,
    CROW,  # where TABLE: how many each query block has
    COL,
    SINKS,
    WINDOW,
    scale,
    heads,
    group,
    queries,
    keys,
    apart,  # 0
    q_b, q_h, q_n,
    out_b, out_h, out_n,
    crow_b, crow_h,
    col_b, col_h, col_i,
    span_h,
    D: tl.constexpr,
    BM: tl.constexpr,  # rows of a tile: PACK heads of ROWS queries
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    PACK: tl.constexpr,
    SUB: tl.constexpr,  # tiles of a query block
    UNIT: tl.constexpr,  # keys from one number of COL to the next, and keys of each
    WIDTH: tl.constexpr,
    TABLE: tl.constexpr,
    SPANS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPECIAL: tl.constexpr,
):
    """Some queries of PACK heads; the heads of a group are neighbours."""
    x = tl.program_id(0)
    kv = tl.program_id(1)
    b = tl.program_id(2)
    slots = group // PACK
    tile = tl.num_programs(0) // slots - 1 - x // slots  # causal lists are longest at the end: those first
    head0 = kv * group + x % slots * PACK
    offset = keys - queries
    r = tl.arange(0, BM)
    row = tile * ROWS + r % ROWS
    head = head0 + r // ROWS
    alive = row < queries
    position = row + offset
    n = tl.arange(0, BN).to(tl.float32)
    d = tl.arange(0, D)
    R: tl.constexpr = WIDTH // BN
    if CAUSAL:
        last = position
        before = tl.minimum(tile * ROWS + ROWS, queries) + offset
    else:
        last = tl.zeros([BM], tl.int32) + (keys - 1)
        before = keys
    if SPANS:
        window = tl.load(WINDOW + head0 * span_h)
        sinks = tl.minimum(tl.load(SINKS + head0 * span_h), before)
        sunk = (sinks + BN - 1) // BN
        low = tl.maximum(tl.maximum(tile * ROWS + offset - window + 1, sinks), 0) // BN
        steps = sunk + tl.maximum((before + BN - 1) // BN - low, 0)
        lists = COL
    else:
        block = tile // SUB
        crow = CROW + b.to(tl.int64) * crow_b + head0.to(tl.int64) * crow_h + block
        lists = COL + b.to(tl.int64) * col_b + head0.to(tl.int64) * col_h
        if TABLE:
            steps = tl.load(crow) * R
            lists += block.to(tl.int64) * col_i
        else:
            first = tl.load(crow)
            steps = (tl.load(crow + 1) - first) * R
            lists += first
    m = tl.full([BM], LEAST, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    unit = scale * LOG2E
    # `apart`: the compiler moves the second group's tile on by adding to the value of this offset, wherever else that
    # value is used. It must not be the one that `row` is made of.
    q_tiles = Q + b.to(tl.int64) * q_b + (head0 // PACK).to(tl.int64) * q_h
    q_of = tl.make_tensor_descriptor(q_tiles, shape=[queries * PACK, D], strides=[q_n, 1], block_shape=[BM, D])
    q = q_of.load([apart + tile * BM, 0])
    for j in tl.range(0, steps, 1, warp_specialize=SPECIAL):
        if SPANS:  # the sinks by themselves, and then what the window has beside them
            start = tl.where(j < sunk, j, j - sunk + low) * BN
            upper = (tl.where(j < sunk, tl.minimum(last, sinks - 1), last) - start).to(tl.float32)
            lower = (tl.where(j < sunk, 0, tl.maximum(position - window + 1, sinks)) - start).to(tl.float32)
        else:
            start = tl.load(lists + j // R) * UNIT + (j % R) * BN
            upper = (last - start).to(tl.float32)
        k = K.load([b, kv, start, 0]).reshape([BN, D]).T
        s = tl.dot(q, k)
        s += _excess(n[None, :], upper[:, None]) * HIDDEN
        if SPANS:
            s += _excess(-n[None, :], -lower[:, None]) * HIDDEN
        top = tl.maximum(m, tl.max(s, 1) * unit)
        p = tl.math.exp2(s * unit - top[:, None])
        shrink = tl.math.exp2(m - top)
        acc = acc * shrink[:, None]
        v = V.load([b, kv, start, 0]).reshape([BN, D])
        acc = tl.dot(p.to(OUT.dtype.element_ty), v, acc)
        l = l * shrink + tl.sum(p, 1)
        m = top
    some = l != 0  # true of a NaN
    acc = acc * (1.0 / tl.where(some, l, 1.0))[:, None]
    at = b.to(tl.int64) * out_b + head.to(tl.int64) * out_h + row.to(tl.int64) * out_n
    tl.store(OUT + at[:, None] + d[None, :], acc.to(OUT.dtype.element_ty), mask=alive[:, None])
    lse = tl.where(some, (m + tl.math.log2(tl.where(some, l, 1.0))) * LN2, -float("inf"))
    tl.store(LSE + (b * heads + head).to(tl.int64) * queries + row, lse, mask=alive)


def form(part: Lists, group: int) -> Form | None:
    """How it would go over these lists, but for single keys; None where it does not."""
    if part.heads is not None or (part.crow is None and part.count is None and part.sinks is None):
        return None
    if part.sinks is not None:
        return Form(TILE, 1, True) if part.causal else None
    if part.width % (TILE // 2) or (part.index is not None and not _mostly_runs(part)):
        return None
    step, table = TILE if part.width % TILE == 0 else TILE // 2, part.count is not None
    if part.q_block % TILE == 0:
        return Form(step, 1, False, table)
    together = part.q_block == TILE // 2 and part.pack == 2 and group % 2 == 0 and part.queries % (TILE // 2) == 0
    return Form(step, 2, False, table) if together else None


def _mostly_runs(part: Lists) -> bool:
    """Whether single keys, which take a pass of their own, are so few that two passes are faster (seen on an H200)."""
    assert part.index is not None and part.col is not None
    return part.col.shape[-1] * part.width > 2 * part.index.shape[-1]


def fits(q: Tensor, k: Tensor, v: Tensor, part: Lists, scale: float, cap: float | None) -> bool:
    """Whether this form can compute it, and is right on this device."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] not in SIZES or q.shape[-1] != v.shape[-1]:
        return False
    found = form(part, q.shape[1] // k.shape[1])
    if cap is not None or scale < SMALLEST or found is None or q.shape[2] < TILE or not all(map(described, (q, k, v))):
        return False
    return right(q.device, q.dtype, q.shape[-1], found)


def described(x: Tensor) -> bool:
    """Whether a tensor descriptor can say where it lies: rows of whole 16 bytes."""
    even = all(n * x.element_size() % 16 == 0 and n for n, size in zip(x.stride()[:-1], x.shape) if size > 1)
    return even and x.data_ptr() % 16 == 0


def descriptor(x: Tensor, step: int) -> TensorDescriptor:
    """Of [b h n] or [b h n d], in tiles of `step` rows of one head."""
    rows = [s if n > 1 else x.shape[-1] * 16 for s, n in zip(x.stride()[:-1], x.shape)]
    return TensorDescriptor(x, list(x.shape), [*rows, 1], [1, 1, step, *x.shape[3:]])


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Lists, scale: float) -> None:
    """Into out and lse."""
    (b, h, n, d), g = q.shape, k.shape[1]
    found = form(part, h // g)
    assert found is not None
    begins = part.count if found.table else part.crow
    pointers = [begins, part.col, part.sinks, part.window]
    rows = TILE // found.pack
    if found.pack > 1:  # a descriptor takes rows that follow on one another: the copy is read once, and is small
        q = q.unflatten(1, (-1, found.pack)).unflatten(3, (-1, rows)).transpose(2, 3).flatten(2, 4)
    triton.set_allocator(scratch)  # for the descriptor that the kernel makes
    _forward[(triton.cdiv(n, rows) * (h // g // found.pack), g, b)](
        q, *(descriptor(x, found.step) for x in (k, v)), out, lse, *(lse if x is None else x for x in pointers),
        scale, h, h // g, n, part.keys, 0, *strides(q, out),
        *lined(begins), *lined(part.col), part.col.stride(2) if part.col is not None else 0,
        0 if part.sinks is None or len(part.sinks) == 1 else 1,
        D=d, BM=TILE, BN=found.step, ROWS=rows, PACK=found.pack, SUB=max(1, part.q_block // rows),
        UNIT=part.step, WIDTH=max(found.step, part.width), TABLE=found.table, SPANS=found.spans, CAUSAL=part.causal,
        SPECIAL=True, num_warps=4, num_stages=2,
    )


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """What Triton asks for where a kernel makes descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def right(device: torch.device, dtype: torch.dtype, size: int, found: Form) -> bool:
    """Whether it agrees with the plain kernel on a small case on this device; a warning says if it does not."""
    from saccade.ops.attend.triton import launch

    draw = rng.generator("ops/attend/triton/hopper")
    part = small(device, found)
    q, k, v = (torch.randn(1, h, part.queries, size, generator=draw).to(device, dtype) for h in (4, 2, 2))
    plain, plain_lse, _ = launch.forward(q, k, v, [part], size**-0.5, None, special=False)
    out, lse = torch.full_like(plain, torch.nan), torch.full_like(plain_lse, torch.nan)
    try:
        forward(q, k, v, out, lse, part, size**-0.5)
        off = max(float((x - y).abs().nan_to_num(torch.inf).max()) for x, y in ((out, plain), (lse, plain_lse)))
    except Exception as broken:  # whatever a compiler throws
        off = broken
    if isinstance(off, float) and off <= 8 * torch.finfo(dtype).eps:
        return True
    what = f"is off by {off:.2g} on a small case" if isinstance(off, float) else f"failed: {off}"
    _log.warning(
        "attend: the warp-specialised kernel (%s, heads of %d, %s) %s on %s; the plain one is used, which is slower",
        str(dtype).split(".")[-1], size, found, what, torch.cuda.get_device_name(device),
    )
    return False


def small(device: torch.device, found: Form) -> Lists:
    """The case that a form is tried on."""
    n = 900 if found.pack == 1 else 960
    shape = {"causal": True, "queries": n, "keys": n, "q_block": TILE // found.pack, "pack": found.pack}
    if found.spans:
        sinks, window = (torch.tensor([n], dtype=torch.int32, device=device) for n in (5, 300))
        return Lists(sinks=sinks, window=window, **shape)
    ends = [-(-min(i + shape["q_block"], n) // found.step) for i in range(0, n, shape["q_block"])]
    rows = [[c for c in range(end) if c % 3 != 1 or c == end - 1] for end in ends]
    if found.table:
        most = max(map(len, rows))
        starts = [[c * found.step + 3 * (c > 0) for c in r] + [0] * (most - len(r)) for r in rows]
        tables = (list(map(len, rows)), starts)
        count, col = (torch.tensor(x, dtype=torch.int32, device=device)[None, None] for x in tables)
        return Lists(count=count, col=col, step=1, width=found.step, **shape)
    crow = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int().to(device)[None, None]
    col = torch.tensor([c for r in rows for c in r], dtype=torch.int32, device=device)[None, None]
    return Lists(crow=crow, col=col, step=found.step, width=found.step, **shape)
