"""Decoding over keys and values of 8 or 4 bits by Triton.

Bytes are read two at a time, as 16-bit numbers, so that the codes of a tile fall into 2 (8 bits) or 4 (4 bits) pieces
of the channels. Each becomes a tile of float16 without a conversion, two codes in a register at once on NVIDIA's
devices: a code or-ed into the mantissa of 1024 is 1024 plus the code, exactly. Scores are added up piece by piece; each
piece of the values has an output of its own. Queries are scaled by a power of two to fit float16. Weights times value
scales are kept within float16 by the largest value scale so far, and 4096 times larger than they are: small ones stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from saccade.ops import device
from saccade.ops.decode.triton import (
    MOST_PARTS,
    Plan,
    far,
    grow,
    job_of,
    join,
    parts_of,
    positions,
    rows,
    steps,
)
from saccade.ops.quantise.api import Quantised
from saccade.ops.tanh import tanh


def _two_codes(shift: int, mask: str, magic: str, less: str, table: str) -> tl.constexpr:
    """Machine code for two 16-bit numbers in a register: shift, mask and magic by one logical step, then subtract."""
    return tl.constexpr(
        f"{{ .reg .b32 t, c; shr.u32 t, $1, {shift}; lop3.b32 t, t, {mask}, {magic}, {table};"
        f" mov.b32 c, {less}; sub.f16x2 $0, t, c; }}"
    )


# 8 bits: the sign turned over, (x & 0xff) ^ 0x6480 is 1024 + code + 128. 4 bits: (x & 15) | 0x6400 is 1024 + code + 8
EIGHT_0, EIGHT_1 = (_two_codes(shift, "0x00ff00ff", "0x64806480", "0x64806480", "0x6a") for shift in (0, 8))
FOUR_0, FOUR_1, FOUR_2, FOUR_3 = (
    _two_codes(shift, "0x000f000f", "0x64006400", "0x64086408", "0xea") for shift in (0, 4, 8, 12)
)


@triton.jit
def _fast(x, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _piece(x, J: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """Codes of the J-th piece of the channels in float16, from pairs of bytes."""
    if BITS == 8:
        if FAST:
            return _fast(x, EIGHT_0 if J == 0 else EIGHT_1)
        return (((x << 8) >> 8) if J == 0 else (x >> 8)).to(tl.float16)
    if FAST:
        return _fast(x, FOUR_0 if J == 0 else (FOUR_1 if J == 1 else (FOUR_2 if J == 2 else FOUR_3)))
    return (((x >> (4 * J)) & 15) - 8).to(tl.float16)


@triton.jit
def _channels(i, J: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Which channels the J-th piece holds."""
    if BITS == 8:
        return 2 * i + J
    return 2 * i + J // 2 + (J % 2) * (SIZE // 2)


@triton.jit
def _asked(Q, i, unit, live, q_d, J: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """The queries' channels of a piece over a power of two, in float16."""
    there = live[:, None] & (i < D * BITS // 16)[None, :]
    q = tl.load(Q + (_channels(i, J, BITS, D) * q_d)[None, :], mask=there, other=0.0).to(tl.float32)
    return (q / unit[:, None]).to(tl.float16)


@triton.jit
def _write(TO, at, live, acc, i, J: tl.constexpr, BITS: tl.constexpr, DV: tl.constexpr):
    """The J-th piece of rows."""
    there = live[:, None] & (i < DV * BITS // 16)[None, :]
    to = at.to(tl.int64)[:, None] * DV + _channels(i, J, BITS, DV)[None, :]
    tl.store(TO + to, acc.to(TO.dtype.element_ty), mask=there)


# fmt: off
@triton.jit(do_not_specialize=["i_b", "i_h", "i_q", "keys", "entries", "parts"])
def _split(Q, K, V, KS, VS, LIST, ACC, STAT, OUT, LSE, q_b, q_h, q_q, q_d, k_b, k_h, k_t, v_b, v_h, v_t, c_b, c_h, c_t,
           d_b, d_h, d_t, i_b, i_h, i_q, i_l, scale, cap, keys, entries, chunk, parts, heads, queries,
           GROUP: tl.constexpr, HR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, WP: tl.constexpr,
           DV: tl.constexpr, WV: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, CAPPED: tl.constexpr,
           BITS: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr):
    # as the kernel of `triton.py`, by pieces of the channels
    if PDL:
        gdc_launch_dependents()
    job, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, head, query, live = job_of(job, heads, queries, HR, QR, RP)
    wide = b.to(tl.int64)
    head0, i, iv = tl.min(head, 0), tl.arange(0, WP), tl.arange(0, WV)
    kv = (head0 // GROUP).to(tl.int64)
    Q += (wide * q_b + head * q_h + query * q_q)[:, None]
    K += wide * k_b + kv * k_h
    V += wide * v_b + kv * v_h
    KS += wide * c_b + kv * c_h
    VS += wide * d_b + kv * d_h
    LIST += wide * i_b + (head0 // HR) * i_h + tl.min(query, 0) * i_q
    every = tl.arange(0, 2 * WP if BITS == 8 else 4 * WP)
    q = tl.load(Q + every[None, :] * q_d, mask=live[:, None] & (every < D)[None, :], other=0.0).to(tl.float32)
    unit = tl.math.exp2(tl.math.floor(tl.math.log2(tl.maximum(tl.max(tl.abs(q), 1), 1e-30))))
    q0 = _asked(Q, i, unit, live, q_d, 0, BITS, D)
    q1 = _asked(Q, i, unit, live, q_d, 1, BITS, D)
    a0 = tl.zeros([RP, WV], tl.float32)
    a1 = tl.zeros([RP, WV], tl.float32)
    if BITS == 4:
        q2 = _asked(Q, i, unit, live, q_d, 2, BITS, D)
        q3 = _asked(Q, i, unit, live, q_d, 3, BITS, D)
        a2 = tl.zeros([RP, WV], tl.float32)
        a3 = tl.zeros([RP, WV], tl.float32)
    m = tl.full([RP], -float("inf"), tl.float32)
    l = tl.zeros([RP], tl.float32)
    largest = 1e-30  # value scale so far
    last = keys - queries + query
    end = tl.minimum(entries, (part + 1) * chunk)
    for t in range(part * chunk, end, BN):
        at, ok = positions(LIST, t, BN, end, keys, i_l, PAGE)
        place = at.to(tl.int64) if WIDE else at
        x = tl.load(K + place[:, None] * k_t + i[None, :], mask=ok[:, None] & (i < D * BITS // 16)[None, :], other=0)
        y = tl.load(V + place[:, None] * v_t + iv[None, :], mask=ok[:, None] & (iv < DV * BITS // 16)[None, :], other=0)
        ks = tl.load(KS + place * c_t, mask=ok, other=0.0).to(tl.float32)
        vs = tl.load(VS + place * d_t, mask=ok, other=0.0).to(tl.float32)
        s = tl.dot(q0, tl.trans(_piece(x, 0, BITS, FAST)))
        s = tl.dot(q1, tl.trans(_piece(x, 1, BITS, FAST)), s)
        if BITS == 4:
            s = tl.dot(q2, tl.trans(_piece(x, 2, BITS, FAST)), s)
            s = tl.dot(q3, tl.trans(_piece(x, 3, BITS, FAST)), s)
        s = s * ks[None, :] * (unit * scale)[:, None]
        if CAPPED:
            s = cap * tanh(s / cap, True)
        p, alpha, m, l = grow(tl.where(ok[None, :] & (at[None, :] <= last[:, None]), s, -float("inf")), m, l)
        new = tl.maximum(largest, tl.max(vs, 0))
        w = (p * (vs * (4096.0 / new))[None, :]).to(tl.float16)
        alpha, largest = (alpha * (largest / new))[:, None], new
        a0 = tl.dot(w, _piece(y, 0, BITS, FAST), a0 * alpha)
        a1 = tl.dot(w, _piece(y, 1, BITS, FAST), a1 * alpha)
        if BITS == 4:
            a2 = tl.dot(w, _piece(y, 2, BITS, FAST), a2 * alpha)
            a3 = tl.dot(w, _piece(y, 3, BITS, FAST), a3 * alpha)
    row, first = (b * heads + head) * queries + query, tl.program_id(0) * (HR * QR) + tl.arange(0, RP)
    some = l != 0
    if parts == 1:
        share = (largest / 4096.0 / tl.where(some, l, 1.0))[:, None]
        _write(OUT, row, live, a0 * share, iv, 0, BITS, DV)
        _write(OUT, row, live, a1 * share, iv, 1, BITS, DV)
        if BITS == 4:
            _write(OUT, row, live, a2 * share, iv, 2, BITS, DV)
            _write(OUT, row, live, a3 * share, iv, 3, BITS, DV)
        lse = m + tl.math.log2(tl.where(some, l, 1.0)) * 0.6931471805599453
        tl.store(LSE + row, tl.where(some, lse, -float("inf")), mask=live)
    else:
        undo = largest / 4096.0
        _write(ACC, first, live, a0 * undo, iv, 0, BITS, DV)
        _write(ACC, first, live, a1 * undo, iv, 1, BITS, DV)
        if BITS == 4:
            _write(ACC, first, live, a2 * undo, iv, 2, BITS, DV)
            _write(ACC, first, live, a3 * undo, iv, 3, BITS, DV)
        tl.store(STAT + first * 2, m, mask=live)
        tl.store(STAT + first * 2 + 1, l, mask=live)
# fmt: on


def reasons(q: Tensor, k: Quantised, v: Quantised, visible: Tensor | None) -> list[str]:
    """Why these kernels cannot read this, beyond what holds for any cache; [] = they can."""
    why = [] if visible is None else ["a mask over a quantised cache is read by plain torch only"]
    if q.dtype not in device.HALVES:
        why.append(
            f"it multiplies in float16, which is too coarse for queries in {str(q.dtype).removeprefix('torch.')}"
        )
    for name, x in (("keys", k), ("values", v)):
        if x.codes.stride(-1) != 1 or any(s % 2 for s in (*x.codes.stride()[:-1], x.codes.storage_offset())):
            why.append(f"the codes of the {name} do not lie in pairs: make them contiguous")
    return why


def decode(
    q: Float[Tensor, "b h q d"],
    k: Quantised,
    v: Quantised,
    index: Int[Tensor, "b h|g|1 q l"] | None,
    *,
    scale: float,
    softcap: float | None,
    page_tokens: int = 1,
    how: Plan | None = None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """See the op's api. `how` is for benchmarks."""
    (b, h, n, d), (g, keys), dv = q.shape, k.shape[1:3], v.size
    share = rows(q, k, index)
    entries = keys if index is None else index.shape[-1] * page_tokens
    pieces = 16 // k.bits
    how = how or _plan(q, share.jobs, entries)
    out = torch.empty(b, h, n, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    acc, stat = parts_of(how, share, dv, out)
    early = device.dependent_launch(q.device.index)
    pairs = [x.codes.view(torch.int16) for x in (k, v)]
    lists = (0, 0, 0, 0) if index is None else steps(index)
    _split[(share.jobs * how.parts,)](
        q, *pairs, k.scale, v.scale, q if index is None else index, acc, stat, out, lse, *q.stride(),
        *pairs[0].stride()[:3], *pairs[1].stride()[:3], *k.scale.stride(), *v.scale.stride(), *lists, scale,
        softcap or 1.0, keys, entries, how.chunk, how.parts, h, n, GROUP=h // g, HR=share.heads, QR=share.queries,
        RP=share.padded, D=d, WP=width(d // pieces), DV=dv, WV=width(dv // pieces), BN=how.block,
        PAGE=0 if index is None else page_tokens, CAPPED=softcap is not None, BITS=k.bits,
        FAST=q.is_cuda and not torch.version.hip, WIDE=far(*pairs), PDL=early,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if how.parts > 1:
        meta = {"HR": share.heads, "QR": share.queries, "DV": dv, "DVP": width(dv)}
        join(acc, stat, out, lse, how.parts, meta, early)
    return out, lse


def _plan(q: Tensor, jobs: int, entries: int) -> Plan:
    """As measured on an H200: four programs on every multiprocessor, since unpacking takes as long as reading."""
    most = min(MOST_PARTS, max(1, triton.cdiv(entries, 128)))
    parts = min(most, max(1, 4 * device.multiprocessors(q.device.index) // jobs))
    chunk = triton.cdiv(triton.cdiv(entries, parts), 64) * 64
    return Plan(64, max(1, triton.cdiv(entries, max(1, chunk))), chunk, 4, 3)


def width(size: int) -> int:
    """Of a tile."""
    return max(16, triton.next_power_of_2(size))
