"""Attention over packed tokens by Triton: codes are read from memory, and become numbers in registers.

As the kernel of `decode`, by which the parts are put together: each program reads some tokens of a row for all of its
queries. A tile lies in one unit. Codes are multiplied as they are, exact in float16: a channel's step goes to the
queries and a token's to its weight, both scaled by powers of two so that float16 holds them; lows and scales are added
and multiplied outside. A byte holds neighbouring channels: each of its places is a piece of the channels, as in
`decode`. Codes are not moved to the end of their byte: where they lie they are so many times a power of two too large,
by which queries and results are divided.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from saccade.ops import device
from saccade.ops.decode.quantised import width
from saccade.ops.decode.triton import MOST_PARTS, MOST_ROWS, Plan, Rows, grow, job_of, join, parts_of
from saccade.ops.packed.api import Packed
from saccade.ops.tanh import tanh


def _two_codes(place: int) -> tl.constexpr:
    """Machine code for two numbers in a register: bits or-ed into the mantissa of 1024 are 1024 plus what they say;
    then 1024 goes."""
    codes = f"lop3.b32 t, $1, {place * 0x10001:#x}, 0x64006400, 0xea;"
    return tl.constexpr(f"{{ .reg .b32 t, c; {codes} mov.b32 c, 0x64006400; sub.f16x2 $0, t, c; }}")


H4_0, H4_1 = (_two_codes(15 << shift) for shift in (0, 4))
H2_0, H2_1, H2_2, H2_3 = (_two_codes(3 << shift) for shift in (0, 2, 4, 6))


@triton.jit
def _fast(x, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _piece(x, J: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """The J-th codes of bytes that lie in 16 bits, times 2^(J BITS), in float16."""
    if not FAST:
        return (x & (((1 << BITS) - 1) << (J * BITS))).to(tl.float16)
    elif BITS == 4:
        return _fast(x, H4_0 if J == 0 else H4_1)
    else:
        return _fast(x, H2_0 if J == 0 else (H2_1 if J == 1 else (H2_2 if J == 2 else H2_3)))


@triton.jit
def _asked(Q, SPAN, i, live, q_d, J: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """Queries of the J-th channel of each byte, times what a code is worth; the largest of each row, and what it finds
    in the lows alone."""
    channel = i * (8 // BITS) + J
    in_d = channel < D
    q = tl.load(Q + channel[None, :] * q_d, mask=live[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    low = tl.load(SPAN + channel * 2, mask=in_d, other=0.0).to(tl.float32)
    step = tl.load(SPAN + channel * 2 + 1, mask=in_d, other=0.0).to(tl.float32)
    steps = q * step[None, :]
    return steps, tl.max(tl.abs(steps), 1), tl.sum(q * low[None, :], 1)


@triton.jit
def _power(x):
    """A power of two that is not below x, nor near nought."""
    return tl.math.exp2(tl.math.ceil(tl.math.log2(tl.maximum(x, 1e-30))))


@triton.jit
def _level(SCALE, i, J: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """Scales of the J-th channel of each byte."""
    channel = i * (8 // BITS) + J
    return tl.load(SCALE + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _write(TO, at, live, x, i, J: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """The J-th piece of rows."""
    channel = i * (8 // BITS) + J
    to = at.to(tl.int64)[:, None] * D + channel[None, :]
    tl.store(TO + to, x.to(TO.dtype.element_ty), mask=live[:, None] & (channel < D)[None, :])


# fmt: off
@triton.jit(do_not_specialize=["tokens", "units", "parts"])
def _split(Q, K, V, KEY_SPAN, VALUE_SPAN, VALUE_SCALE, TOKENS, ACC, STAT, OUT, LSE, q_b, q_h, q_q, q_d, scale, cap,
           tokens, units, chunk, parts, heads, queries, HR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr,
           D: tl.constexpr, WP: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr, BITS: tl.constexpr,
           FAST: tl.constexpr, PDL: tl.constexpr):
# fmt: on
    """The queries of one row over its tokens [part * chunk, (part + 1) * chunk)."""
    if PDL:
        gdc_launch_dependents()
    each: tl.constexpr = 8 // BITS
    job, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, head, query, live = job_of(job, heads, queries, HR, QR, RP)
    i, wide = tl.arange(0, WP), b.to(tl.int64)
    in_row = (i < D // each)[None, :]
    Q += (wide * q_b + head * q_h + query * q_q)[:, None]
    K += wide * tokens * (D // each)
    V += wide * tokens * (D // each)
    VALUE_SPAN += wide * tokens * 2
    m = tl.full([RP], -float("inf"), tl.float32)
    l = tl.zeros([RP], tl.float32)
    a0 = tl.zeros([RP, WP], tl.float32)
    a1 = tl.zeros([RP, WP], tl.float32)
    if BITS == 2:
        a2 = tl.zeros([RP, WP], tl.float32)
        a3 = tl.zeros([RP, WP], tl.float32)
    largest = 1e-30  # power of two above the steps so far: weights times steps stay within float16, and small ones stay
    start, end, first = part * chunk, tl.minimum(tokens, (part + 1) * chunk), 0
    for unit in range(units):
        behind = first + tl.load(TOKENS + wide * units + unit)
        a, z = tl.maximum(first, start), tl.minimum(behind, end)
        first = behind
        if a < z:
            channels = (wide * units + unit) * D
            spans = KEY_SPAN + channels * 2
            q0, top, low = _asked(Q, spans, i, live, q_d, 0, BITS, D)
            q1, other, more = _asked(Q, spans, i, live, q_d, 1, BITS, D)
            top, low = tl.maximum(top, other), low + more
            e0 = _level(VALUE_SCALE + channels, i, 0, BITS, D)
            e1 = _level(VALUE_SCALE + channels, i, 1, BITS, D)
            if BITS == 2:
                q2, other, more = _asked(Q, spans, i, live, q_d, 2, BITS, D)
                top, low = tl.maximum(top, other), low + more
                q3, other, more = _asked(Q, spans, i, live, q_d, 3, BITS, D)
                top, low = tl.maximum(top, other), low + more
                e2 = _level(VALUE_SCALE + channels, i, 2, BITS, D)
                e3 = _level(VALUE_SCALE + channels, i, 3, BITS, D)
            unit_q = _power(top)[:, None]
            q0, q1 = (q0 / unit_q).to(tl.float16), (q1 / (unit_q * (1 << BITS))).to(tl.float16)
            if BITS == 2:
                q2, q3 = (q2 / (unit_q * 16)).to(tl.float16), (q3 / (unit_q * 64)).to(tl.float16)
            for t in range(a, z, BN):
                at = t + tl.arange(0, BN)
                there = at < z
                place = at.to(tl.int64)
                byte = place[:, None] * (D // each) + i[None, :]
                x = tl.load(K + byte, mask=there[:, None] & in_row, other=0).to(tl.int16)
                y = tl.load(V + byte, mask=there[:, None] & in_row, other=0).to(tl.int16)
                v_low = tl.load(VALUE_SPAN + place * 2, mask=there, other=0.0).to(tl.float32)
                v_step = tl.load(VALUE_SPAN + place * 2 + 1, mask=there, other=0.0).to(tl.float32)
                s = tl.dot(q0, tl.trans(_piece(x, 0, BITS, FAST)))
                s = tl.dot(q1, tl.trans(_piece(x, 1, BITS, FAST)), s)
                if BITS == 2:
                    s = tl.dot(q2, tl.trans(_piece(x, 2, BITS, FAST)), s)
                    s = tl.dot(q3, tl.trans(_piece(x, 3, BITS, FAST)), s)
                s = (s * unit_q + low[:, None]) * scale
                if CAPPED:
                    s = cap * tanh(s / cap, True)
                p, alpha, m, l = grow(tl.where(there[None, :], s, -float("inf")), m, l)
                new = tl.maximum(largest, _power(tl.max(v_step, 0)))
                w = (p * (v_step * (4096.0 / new))[None, :]).to(tl.float16)
                alpha, back, largest = alpha[:, None], new / 4096.0, new
                base = tl.sum(p * v_low[None, :], 1)[:, None]
                a0 = a0 * alpha + (tl.dot(w, _piece(y, 0, BITS, FAST)) * back + base) * e0
                a1 = a1 * alpha + (tl.dot(w, _piece(y, 1, BITS, FAST)) * (back / (1 << BITS)) + base) * e1
                if BITS == 2:
                    z2 = tl.dot(w, _piece(y, 2, BITS, FAST))
                    z3 = tl.dot(w, _piece(y, 3, BITS, FAST))
                    a2 = a2 * alpha + (z2 * (back / 16) + base) * e2
                    a3 = a3 * alpha + (z3 * (back / 64) + base) * e3
    some = l != 0
    if parts == 1:
        row, share = (b * heads + head) * queries + query, (1.0 / tl.where(some, l, 1.0))[:, None]
        _write(OUT, row, live, a0 * share, i, 0, BITS, D)
        _write(OUT, row, live, a1 * share, i, 1, BITS, D)
        if BITS == 2:
            _write(OUT, row, live, a2 * share, i, 2, BITS, D)
            _write(OUT, row, live, a3 * share, i, 3, BITS, D)
        lse = m + tl.math.log2(tl.where(some, l, 1.0)) * 0.6931471805599453
        tl.store(LSE + row, tl.where(some, lse, -float("inf")), mask=live)
    else:
        to = tl.program_id(0) * (HR * QR) + tl.arange(0, RP)
        _write(ACC, to, live, a0, i, 0, BITS, D)
        _write(ACC, to, live, a1, i, 1, BITS, D)
        if BITS == 2:
            _write(ACC, to, live, a2, i, 2, BITS, D)
            _write(ACC, to, live, a3, i, 3, BITS, D)
        tl.store(STAT + to * 2, m, mask=live)
        tl.store(STAT + to * 2 + 1, l, mask=live)


def reasons(q: Tensor, x: Packed) -> list[str]:
    """Why this kernel cannot read this; [] = it can."""
    why = device.triton_reasons(q)
    if q.dtype not in device.HALVES or q.dtype != x.value_scale.dtype:
        found = f"queries in {q.dtype} and packed tokens from {x.value_scale.dtype}"
        why.append(f"it takes float16 or bfloat16, one for all, and finds {found}")
    if x.size > 256:
        why.append(f"heads of {x.size}; it takes up to 256")
    if (n := q.shape[1] * q.shape[2]) > MOST_ROWS:
        why.append(f"{n} queries of a row; it takes up to {MOST_ROWS}")
    if not all(t.is_contiguous() for t in vars(x).values()):
        why.append("the packed tokens do not lie one behind the other: make them contiguous")
    return why


def attend(
    q: Float[Tensor, "r s q d"], x: Packed, *, scale: float, softcap: float | None
) -> tuple[Float[Tensor, "r s q d"], Float[Tensor, "r s q"]]:
    """See the op's api."""
    (r, s, n, d), tokens = q.shape, x.keys.shape[1]
    share, how = Rows(s, n, r), _plan(q, tokens)
    out = torch.empty(r, s, n, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(r, s, n, dtype=torch.float32, device=q.device)
    acc, stat = parts_of(how, share, d, out)
    early = device.dependent_launch(q.device.index)
    _split[(r * how.parts,)](
        q, x.keys, x.values, x.key_span, x.value_span, x.value_scale, x.tokens, acc, stat, out, lse, *q.stride(), scale,
        softcap or 1.0, tokens, x.tokens.shape[1], how.chunk, how.parts, s, n, HR=s, QR=n, RP=share.padded, D=d,
        WP=width(d * x.bits // 8), BN=how.block, CAPPED=softcap is not None, BITS=x.bits,
        FAST=q.is_cuda and not torch.version.hip, PDL=early, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if how.parts > 1:
        join(acc, stat, out, lse, how.parts, {"HR": s, "QR": n, "DV": d, "DVP": width(d)}, early)
    return out, lse


def _plan(q: Tensor, tokens: int) -> Plan:
    """As measured on an H200: programs of one warp, which wait for nobody, eight on every multiprocessor; where one
    warp has too few registers, two of four warps."""
    alone = q.shape[-1] <= 128 and q.shape[1] * q.shape[2] <= 16
    block, warps, programs = (32, 1, 8) if alone else (64 if q.shape[-1] > 128 else 128, 4, 2)
    most = min(MOST_PARTS, max(1, triton.cdiv(tokens, 2 * block)))
    parts = min(most, max(1, programs * device.multiprocessors(q.device.index) // len(q)))
    chunk = triton.cdiv(triton.cdiv(tokens, parts), block) * block
    return Plan(block, triton.cdiv(tokens, chunk), chunk, warps, 3)
