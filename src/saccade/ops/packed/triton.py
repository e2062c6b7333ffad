"""Attention over packed tokens by Triton: codes are read from memory, and become numbers in registers.

As the kernel of `decode`, by which the parts are put together: each program reads some tokens of a row for all of its
queries. A tile lies in one unit, whose spans and scales are read once for it. What a code stands for is rounded to the
precision of the queries, as where it is spelt out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from saccade.ops import device
from saccade.ops.decode.triton import MOST_PARTS, MOST_ROWS, Plan, Rows, finish, grow, job_of, join, keep_part, parts_of
from saccade.ops.packed.api import Packed
from saccade.ops.tanh import tanh


@triton.jit
def _codes(X, row, at, ok, d, D: tl.constexpr, BITS: tl.constexpr):
    """Codes [tokens, channels] of some tokens of a row of bytes."""
    each: tl.constexpr = 8 // BITS
    x = tl.load(X + (row + at.to(tl.int64))[:, None] * (D // each) + (d // each)[None, :], mask=ok, other=0)
    return ((x.to(tl.int32) >> (d % each * BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


# fmt: off
@triton.jit
def _split(Q, K, V, KEY_SPAN, VALUE_SPAN, VALUE_SCALE, TOKENS, ACC, STAT, OUT, LSE, q_b, q_h, q_q, q_d, scale, cap,
           tokens, units, chunk, parts, heads, queries, HR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr,
           D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr, BITS: tl.constexpr,
           PDL: tl.constexpr):
# fmt: on
    """The queries of one row over its tokens [part * chunk, (part + 1) * chunk)."""
    if PDL:
        gdc_launch_dependents()
    job, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, head, query, live = job_of(job, heads, queries, HR, QR, RP)
    d, wide = tl.arange(0, DP), b.to(tl.int64)
    in_d = d < D
    at_q = wide * q_b + (head * q_h + query * q_q)[:, None] + d[None, :] * q_d
    q = tl.load(Q + at_q, mask=live[:, None] & in_d[None, :], other=0.0)
    m = tl.full([RP], -float("inf"), tl.float32)
    l = tl.zeros([RP], tl.float32)
    acc = tl.zeros([RP, DP], tl.float32)
    start, end, first = part * chunk, tl.minimum(tokens, (part + 1) * chunk), 0
    for unit in range(units):
        behind = first + tl.load(TOKENS + wide * units + unit)
        a, z = tl.maximum(first, start), tl.minimum(behind, end)
        first = behind
        if a < z:
            channel = (wide * units + unit) * D + d
            k_low = tl.load(KEY_SPAN + channel * 2, mask=in_d, other=0.0).to(tl.float32)[None, :]
            k_step = tl.load(KEY_SPAN + channel * 2 + 1, mask=in_d, other=0.0).to(tl.float32)[None, :]
            level = tl.load(VALUE_SCALE + channel, mask=in_d, other=0.0).to(tl.float32)[None, :]
            for t in range(a, z, BN):
                at = t + tl.arange(0, BN)
                there = at < z
                ok = there[:, None] & in_d[None, :]
                k = (k_low + k_step * _codes(K, wide * tokens, at, ok, d, D, BITS)).to(q.dtype)
                s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                if CAPPED:
                    s = cap * tanh(s / cap, True)
                p, alpha, m, l = grow(tl.where(there[None, :], s, -float("inf")), m, l)
                span = VALUE_SPAN + (wide * tokens + at.to(tl.int64)) * 2
                v_low = tl.load(span, mask=there, other=0.0).to(tl.float32)[:, None]
                v_step = tl.load(span + 1, mask=there, other=0.0).to(tl.float32)[:, None]
                v = ((v_low + v_step * _codes(V, wide * tokens, at, ok, d, D, BITS)) * level).to(q.dtype)
                acc = acc * alpha[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
    if parts == 1:
        finish(OUT, LSE, (b * heads + head) * queries + query, live, acc, m, l, D, DP)
    else:
        keep_part(ACC, STAT, tl.program_id(0) * (HR * QR), tl.arange(0, RP), live, acc, m, l, D, DP)


def reasons(q: Tensor, x: Packed) -> list[str]:
    """Why this kernel cannot read this; [] = it can."""
    why = device.triton_reasons(q)
    if q.dtype == torch.float64 or q.dtype != x.value_scale.dtype:
        why.append(f"it computes in float32 at most, in one precision, and the inputs are {q.dtype}")
    if x.size > (128 if q.dtype == torch.float32 else 256):
        why.append(f"heads of {x.size}; it takes up to 128 in float32, 256 else")
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
    early, width = device.dependent_launch(q.device.index), max(16, triton.next_power_of_2(d))
    _split[(r * how.parts,)](
        q, x.keys, x.values, x.key_span, x.value_span, x.value_scale, x.tokens, acc, stat, out, lse, *q.stride(), scale,
        softcap or 1.0, tokens, x.tokens.shape[1], how.chunk, how.parts, s, n, HR=s, QR=n, RP=share.padded, D=d,
        DP=width, BN=how.block, CAPPED=softcap is not None, BITS=x.bits, PDL=early, num_warps=how.warps,
        num_stages=how.stages,
    )  # fmt: skip
    if how.parts > 1:
        join(acc, stat, out, lse, how.parts, {"HR": s, "QR": n, "DV": d, "DVP": width}, early)
    return out, lse


def _plan(q: Tensor, tokens: int) -> Plan:
    """Four programs on every multiprocessor, as where 4 and 8 bits are decoded; not measured for these codes."""
    block = 32 if q.element_size() * q.shape[-1] > 256 else 64
    most = min(MOST_PARTS, max(1, triton.cdiv(tokens, 2 * block)))
    parts = min(most, max(1, 4 * device.multiprocessors(q.device.index) // len(q)))
    chunk = triton.cdiv(triton.cdiv(tokens, parts), block) * block
    return Plan(block, triton.cdiv(tokens, chunk), chunk, 4, 2)
