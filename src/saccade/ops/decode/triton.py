"""Decoding by Triton: each program reads some keys for all query rows that share them, then the parts are combined.

Rows that share a list are one tile: the query heads of a key/value head, and, without a list, its few queries too. The
keys of a list are split over programs until the device is full; every part keeps its largest logit, its sum of
exponentials and its unnormalised output, which a second kernel weighs together. That kernel is launched before the
first has ended where the device can (`dependent_launch`). Nothing here waits for the device: calls can be captured in a
CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.ops import device
from saccade.ops.quantise.api import Quantised
from saccade.ops.tanh import tanh
from saccade.ops.unclaimed import unclaimed

MOST_ROWS = 64  # of one tile
MOST_PARTS = 256


@triton.jit
def positions(LIST, t, BN: tl.constexpr, end, keys, i_l, PAGE: tl.constexpr):
    """Keys of the entries [t, t + BN): keys with these numbers, or tokens of the listed pages. And which there are."""
    i = t + tl.arange(0, BN)
    ok = i < end
    if PAGE == 0:
        return i, ok
    page = tl.load(LIST + (i // PAGE).to(tl.int64) * i_l, mask=ok, other=-1).to(tl.int32)
    at = page * PAGE + (t + unclaimed(BN)) % PAGE
    return at, ok & (page >= 0) & (at < keys)


@triton.jit
def grow(s, m, l):
    """One step of the online softmax: weights, factor for what was summed before, new maximum, new sum.

    The maximum stays in natural units and only differences are turned to base 2, or lse would be rounded twice.
    """
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == -float("inf"), 0.0, top)
    p = tl.math.exp2((s - base[:, None]) * 1.4426950408889634)
    alpha = tl.math.exp2((m - base) * 1.4426950408889634)
    return p, alpha, top, l * alpha + tl.sum(p, 1)


@triton.jit
def job_of(job, heads, queries, HR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr):
    """Sequence, head and query of every row of a job, and which rows there are."""
    lists = queries // QR
    b = job // ((heads // HR) * lists)
    rest = job % ((heads // HR) * lists)
    r = tl.arange(0, RP)
    return b, (rest // lists) * HR + r // QR, (rest % lists) * QR + r % QR, r < HR * QR


@triton.jit
def finish(OUT, LSE, row, live, acc, m, l, DV: tl.constexpr, DVP: tl.constexpr):
    """Write normalised rows and their natural log-sum-exp; zeros and -inf where a row saw nothing."""
    d = tl.arange(0, DVP)
    some = l != 0  # not l > 0: a NaN stays one
    out = acc / tl.where(some, l, 1.0)[:, None]
    tl.store(OUT + row.to(tl.int64)[:, None] * DV + d, out.to(OUT.dtype.element_ty), mask=live[:, None] & (d < DV))
    lse = tl.where(some, m + tl.math.log2(tl.where(some, l, 1.0)) * 0.6931471805599453, -float("inf"))
    tl.store(LSE + row, lse, mask=live)


@triton.jit
def keep_part(ACC, STAT, first, r, live, acc, m, l, DV: tl.constexpr, DVP: tl.constexpr):
    """Write a part's unnormalised rows, their maxima and sums; rows of a part lie together from `first` on."""
    d = tl.arange(0, DVP)
    at = first.to(tl.int64) + r
    tl.store(ACC + at[:, None] * DV + d, acc, mask=live[:, None] & (d < DV))
    tl.store(STAT + at * 2, m, mask=live)
    tl.store(STAT + at * 2 + 1, l, mask=live)


# fmt: off
# what grows with the text is not compiled anew where it happens to be a multiple of 16
@triton.jit(do_not_specialize=["i_b", "i_h", "i_q", "s_b", "s_h", "s_q", "keys", "entries", "parts"])
def _split(Q, K, V, LIST, SEEN, ACC, STAT, OUT, LSE, q_b, q_h, q_q, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
           i_b, i_h, i_q, i_l, s_b, s_h, s_q, s_k, scale, cap, keys, entries, chunk, parts, heads, queries,
           GROUP: tl.constexpr, HR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr, D: tl.constexpr,
           DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
           MASKED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, WAIT: tl.constexpr,
           PDL: tl.constexpr):
# fmt: on
    """The rows of one job over the entries [part * chunk, (part + 1) * chunk) of its list."""
    if PDL:
        gdc_launch_dependents()
    job, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, head, query, live = job_of(job, heads, queries, HR, QR, RP)
    first = tl.program_id(0) * (HR * QR)
    head0, query0 = tl.min(head, 0), tl.min(query, 0)
    d, dv, kv = tl.arange(0, DP), tl.arange(0, DVP), (head0 // GROUP).to(tl.int64)
    in_d, in_dv = (d < D)[None, :], (dv < DV)[None, :]
    Q += b.to(tl.int64) * q_b
    q = tl.load(Q + (head * q_h + query * q_q)[:, None] + d[None, :] * q_d, mask=live[:, None] & in_d, other=0.0)
    K += b.to(tl.int64) * k_b + kv * k_h
    V += b.to(tl.int64) * v_b + kv * v_h
    # lists and masks may be shared: their steps are then 0; the head axis of a list counts jobs, not query heads
    LIST += b.to(tl.int64) * i_b + (head0 // HR) * i_h + query0 * i_q
    SEEN += b.to(tl.int64) * s_b
    m = tl.full([RP], -float("inf"), tl.float32)
    l = tl.zeros([RP], tl.float32)
    acc = tl.zeros([RP, DVP], tl.float32)
    last = keys - queries + query
    if WAIT:
        gdc_wait()
    end = tl.minimum(entries, (part + 1) * chunk)
    for t in range(part * chunk, end, BN):
        at, ok = positions(LIST, t, BN, end, keys, i_l, PAGE)
        far = at.to(tl.int64) if WIDE else at
        k = tl.load(K + far[:, None] * k_t + d[None, :] * k_d, mask=ok[:, None] & in_d, other=0.0)
        v = tl.load(V + far[:, None] * v_t + dv[None, :] * v_d, mask=ok[:, None] & in_dv, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            s = cap * tanh(s / cap, True)
        allowed = ok[None, :] & (at[None, :] <= last[:, None])
        if MASKED:
            allowed &= live[:, None]
            seen = (head * s_h + query * s_q).to(tl.int64)[:, None] + (at.to(tl.int64) * s_k)[None, :]
            allowed &= tl.load(SEEN + seen, mask=allowed, other=0) != 0
        p, alpha, m, l = grow(tl.where(allowed, s, -float("inf")), m, l)
        if V.dtype.element_ty == tl.float32:  # by tiles: one sum over all keys would be less right than PyTorch's
            acc = acc * alpha[:, None] + tl.dot(p, v, input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    if parts == 1:
        finish(OUT, LSE, (b * heads + head) * queries + query, live, acc, m, l, DV, DVP)
    else:
        keep_part(ACC, STAT, first, tl.arange(0, RP), live, acc, m, l, DV, DVP)


@triton.jit(do_not_specialize=["parts"])
def combine(ACC, STAT, OUT, LSE, parts, heads, queries, HR: tl.constexpr, QR: tl.constexpr, DV: tl.constexpr,
            DVP: tl.constexpr, BS: tl.constexpr, PDL: tl.constexpr):
    """One row: its parts, weighed by their maxima."""
    row = tl.program_id(0)
    b, head, query = row // (heads * queries), row // queries % heads, row % queries
    job = (b * (heads // HR) + head // HR) * (queries // QR) + query // QR
    first = job.to(tl.int64) * parts * (HR * QR) + (head % HR) * QR + query % QR
    if PDL:
        gdc_wait()
    d = tl.arange(0, DVP)
    m = tl.full([1], -float("inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, DVP], tl.float32)
    for s0 in range(0, parts, BS):
        s = s0 + tl.arange(0, BS)
        ok = s < parts
        at = first + s * (HR * QR)
        part_m = tl.load(STAT + at * 2, mask=ok, other=-float("inf"))
        part_l = tl.load(STAT + at * 2 + 1, mask=ok, other=0.0)
        x = tl.load(ACC + at[:, None] * DV + d[None, :], mask=ok[:, None] & (d < DV)[None, :], other=0.0)
        top = tl.maximum(m, tl.max(part_m, 0))
        base = tl.where(top == -float("inf"), 0.0, top)
        w = tl.math.exp2((part_m - base) * 1.4426950408889634)
        alpha = tl.math.exp2((m - base) * 1.4426950408889634)
        l = l * alpha + tl.sum(w * part_l, 0)
        acc = acc * alpha[:, None] + tl.sum(w[:, None] * x, 0)[None, :]
        m = top
    finish(OUT, LSE, row + tl.zeros([1], tl.int32), tl.full([1], 1, tl.int1), acc, m, l, DV, DVP)


@dataclass(frozen=True)
class Plan:
    """How a call is cut: `block` keys a step, `parts` programs for each job of `chunk` entries."""

    block: int
    parts: int
    chunk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Rows:
    """Which rows share their keys: `heads` query heads and `queries` queries, in `jobs` such sets."""

    heads: int
    queries: int
    jobs: int

    @property
    def padded(self) -> int:
        """Rows of a tile; the matrix units take 16 or more."""
        return max(16, triton.next_power_of_2(self.heads * self.queries))


def rows(q: Tensor, k: Tensor | Quantised, index: Tensor | None) -> Rows:
    """The query heads of a key/value head share a list that has one row for them, and all keys where there is none."""
    b, h, n, _ = q.shape
    shared = index is None or index.shape[1] in (1, k.shape[1])
    heads = h // k.shape[1] if shared else 1
    queries = n if index is None else 1
    return Rows(heads, queries, b * (h // heads) * (n // queries))


def plan(q: Tensor, jobs: int, entries: int, size: int, listed: bool) -> Plan:
    """Enough programs for every multiprocessor, each with several tiles of keys.

    size: bytes of a key, rounded up to a power of two.
    listed: keys come from a list, whose reading is one more stage ahead of theirs. All as measured on an H200.
    """
    units = device.multiprocessors(q.device.index)
    few, many = listed and jobs * entries <= 256 * units, listed and 2 * jobs > 3 * units
    block = max(16, min(128, 16384 // size))
    most = min(MOST_PARTS, max(1, triton.cdiv(entries, max(2 * block, 128) if listed else block)))
    parts = 1 if many else min(most, max(1, (4 if listed else 2) * units // jobs))
    chunk = triton.cdiv(triton.cdiv(entries, parts), block) * block
    stages = 5 if many else (4 if listed and not few else 3)
    return Plan(block, max(1, triton.cdiv(entries, max(1, chunk))), chunk, 2 if few else 4, stages)


def reasons(q: Tensor, k: Tensor, v: Tensor, *, listed: bool, entries: int = 1) -> list[str]:
    """Why these kernels cannot decode this; [] = they can. entries: of each list, where keys are `listed`."""
    why = device.triton_reasons(q, k, v)
    if q.dtype == torch.float64:
        why.append("it computes in float32 at most, and the inputs are float64")
    wide = max(q.shape[-1], v.shape[-1])
    if wide > 256:
        why.append(f"heads of {wide}; it takes up to 256")
    elif wide > 128 and q.dtype == torch.float32:
        why.append(f"heads of {wide} in float32: above 128 its rounding error is more than twice PyTorch's")
    if (n := q.shape[1] // k.shape[1] * (1 if listed else q.shape[2])) > MOST_ROWS:
        why.append(f"{n} rows share the keys of a head; it takes up to {MOST_ROWS}")
    if not (q.numel() and v.numel() and entries):
        why.append("there is nothing to read")
    return why


def decode(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    index: Int[Tensor, "b h|g|1 q l"] | None,
    visible: Bool[Tensor, "b h q k"] | None,
    *,
    scale: float,
    softcap: float | None,
    page_tokens: int = 1,
    follows: bool = False,
    how: Plan | None = None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """See the op's api.

    follows: `index` comes from a kernel that says itself when this one may start (dependent launch)
    how: for benchmarks
    """
    (b, h, n, d), (g, keys), dv = q.shape, k.shape[1:3], v.shape[-1]
    share = rows(q, k, index)
    page = 0 if index is None else page_tokens
    entries = keys if index is None else index.shape[-1] * page_tokens
    wide = triton.next_power_of_2(max(d, dv))
    how = how or plan(q, share.jobs, entries, wide * k.element_size(), index is not None)
    out = torch.empty(b, h, n, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    acc, stat = parts_of(how, share, dv, out)
    early = device.dependent_launch(q.device.index)
    meta = {"HR": share.heads, "QR": share.queries, "DV": dv, "DVP": max(16, triton.next_power_of_2(dv))}
    given = [q if index is None else index, q if visible is None else visible.view(torch.uint8)]
    _split[(share.jobs * how.parts,)](
        q, k, v, *given, acc, stat, out, lse,
        *q.stride(), *k.stride(), *v.stride(), *steps(index), *steps(visible), scale, softcap or 1.0, keys, entries,
        how.chunk, how.parts, h, n, GROUP=h // g, RP=share.padded, D=d, DP=max(16, triton.next_power_of_2(d)),
        BN=how.block, PAGE=page, MASKED=visible is not None, CAPPED=softcap is not None, WIDE=far(k, v),
        WAIT=early and follows, PDL=early, num_warps=how.warps, num_stages=how.stages, **meta,
        **({"launch_pdl": True} if early and follows else {}),
    )  # fmt: skip
    if how.parts > 1:
        join(acc, stat, out, lse, how.parts, meta, early)
    return out, lse


def parts_of(how: Plan, share: Rows, dv: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the parts: outputs, and (maximum, sum); where there is one part it writes the result itself."""
    if how.parts == 1:
        return out, out
    room = share.jobs * how.parts * share.heads * share.queries
    sizes = {"dtype": torch.float32, "device": out.device}
    return torch.empty(room, dv, **sizes), torch.empty(room, 2, **sizes)


def join(acc: Tensor, stat: Tensor, out: Tensor, lse: Tensor, parts: int, meta: dict[str, int], early: bool) -> None:
    """Combine the parts of every row."""
    b, h, n, _ = out.shape
    block = min(triton.next_power_of_2(parts), 32)
    launch = {"launch_pdl": True} if early else {}
    combine[(b * h * n,)](acc, stat, out, lse, parts, h, n, BS=block, PDL=early, num_warps=4, **meta, **launch)


def steps(x: Tensor | None) -> tuple[int, int, int, int]:
    """Strides; 0 along axes of size 1 in batch and heads, which stand for all."""
    if x is None:
        return 0, 0, 0, 0
    b, h, q, k = x.stride()
    return (b if x.shape[0] > 1 else 0), (h if x.shape[1] > 1 else 0), q, k


def far(*caches: Tensor) -> bool:
    """Whether the elements of a head lie further apart than 32 bits can count."""
    return any(x.shape[2] * x.stride(2) + x.shape[3] * x.stride(3) >= 2**31 for x in caches)
