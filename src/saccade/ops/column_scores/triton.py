"""Column sums (and sums along diagonals) of a few queries' attention by Triton, in two passes over the keys.

First every row's largest logit and its sum of exponentials, by parts of the keys; then, key tile by key tile, the
weights of all rows, added up over each column and, where asked, over each diagonal. A tile of keys is read once for all
query heads of its key/value head, and no weight leaves the chip. float32 is multiplied as three products of 19-bit
floats (tf32x3), which is as right to a few units in the last place.

A single query, as in decoding, needs one pass: its logits are few beside the keys, and become weights where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saccade.ops import device
from saccade.ops.decode.triton import far, grow
from saccade.ops.tanh import tanh

MOST_QUERIES = 128  # a diagonal then crosses two tiles at most
WEIGHED = 2048  # logits of a program


# fmt: off
@triton.jit
def _normalise(Q, K, STAT, LOGITS, AT, q_b, q_h, q_q, q_d, k_b, k_h, k_t, k_d, scale, cap, keys, chunk, parts, heads,
               queries, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PLACED: tl.constexpr, CAPPED: tl.constexpr,
               WIDE: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr):
# fmt: on
    """Largest logit and sum of exponentials of some rows of a key/value head over one part of the keys; where KEPT, of
    one query, the logits themselves."""
    part, job, group = tl.program_id(0), tl.program_id(1), heads // GROUP
    b, kv = job // group, job % group
    r = tl.program_id(2) * BM + tl.arange(0, BM)
    head, query, live = kv * GROUP + r // queries, r % queries, r < GROUP * queries
    d = tl.arange(0, DP)
    in_d = (d < D)[None, :]
    Q += b.to(tl.int64) * q_b
    K += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    q = tl.load(Q + (head * q_h + query * q_q)[:, None] + d[None, :] * q_d, mask=live[:, None] & in_d, other=0.0)
    last = keys - 1 - (queries - 1 - query if CAUSAL else query * 0)
    if PLACED:
        last = tl.load(AT + query)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    for t in range(part * chunk, tl.minimum(keys, (part + 1) * chunk), BN):
        at = t + tl.arange(0, BN)
        place = at.to(tl.int64) if WIDE else at
        k = tl.load(K + place[:, None] * k_t + d[None, :] * k_d, mask=(at < keys)[:, None] & in_d, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee" if KEPT else "tf32x3") * scale  # few rows: memory bounds it
        if CAPPED:
            s = cap * tanh(s / cap, True)
        s = tl.where(at[None, :] <= last[:, None], s, -float("inf"))
        _, _, m, l = grow(s, m, l)
        if KEPT:
            line = (b * heads + head).to(tl.int64) * keys
            tl.store(LOGITS + line[:, None] + at[None, :], s, mask=live[:, None] & (at < keys)[None, :])
    row = ((b * heads + head) * queries + query) * parts + part
    tl.store(STAT + row * 2, m, mask=live)
    tl.store(STAT + row * 2 + 1, l, mask=live)


@triton.jit
def _join(STAT, TOP, SHARE, parts, BS: tl.constexpr):
    """A row's largest logit over all parts, and one over its sum of exponentials."""
    row = tl.program_id(0)
    i = tl.arange(0, BS)
    m = tl.load(STAT + (row * parts + i) * 2, mask=i < parts, other=-float("inf"))
    l = tl.load(STAT + (row * parts + i) * 2 + 1, mask=i < parts, other=0.0)
    top = tl.max(m, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(l * tl.math.exp2((m - base) * 1.4426950408889634), 0)
    tl.store(TOP + row, base)
    tl.store(SHARE + row, 1.0 / total)


@triton.jit
def _weigh(LOGITS, TOP, SHARE, keys, BN: tl.constexpr):
    """Logits of a row, turned into its weights where they lie."""
    row = tl.program_id(1)
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    place = LOGITS + row.to(tl.int64) * keys + at
    s = tl.load(place, mask=at < keys, other=-float("inf"))
    p = tl.math.exp2((s - tl.load(TOP + row)) * 1.4426950408889634) * tl.load(SHARE + row)
    tl.store(place, p, mask=at < keys)


@triton.jit
def _diagonals(DIAGONALS, p, t, keys, queries, BN: tl.constexpr, WP: tl.constexpr):
    """Add the weights of a tile, [keys, queries], along its diagonals: those that start in it, and those that enter."""
    c, r = tl.arange(0, BN), tl.arange(0, WP)
    turned = tl.gather(p, (c[:, None] + r[None, :]) % BN, 0)
    inside = c[:, None] + r[None, :] < BN
    behind = keys - queries - t - c  # how far the key of the tile's diagonal c is behind its query
    here = tl.sum(tl.where(inside, turned, 0.0), 1)
    tl.atomic_add(DIAGONALS + behind, here, mask=(behind >= 0) & (behind < keys), sem="relaxed")
    behind += BN
    here = tl.sum(tl.where(inside, 0.0, turned), 1)
    tl.atomic_add(DIAGONALS + behind, here, mask=(behind >= 0) & (behind < keys), sem="relaxed")


# fmt: off
@triton.jit
def _add_up(Q, K, TOP, SHARE, COLUMNS, DIAGONALS, AT, q_b, q_h, q_q, q_d, k_b, k_h, k_t, k_d, scale, cap, keys,
            heads, queries, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PLACED: tl.constexpr, CAPPED: tl.constexpr,
            WIDE: tl.constexpr, LINES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr,
            BN: tl.constexpr):
# fmt: on
    """The weights of all rows on one tile of keys, summed over columns (and diagonals), head by head."""
    job, group = tl.program_id(1), heads // GROUP
    b, kv = job // group, job % group
    t = tl.program_id(0) * BN
    at, r, d = t + tl.arange(0, BN), tl.arange(0, WP), tl.arange(0, DP)
    in_d = (d < D)[None, :]
    Q += b.to(tl.int64) * q_b
    K += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    place = at.to(tl.int64) if WIDE else at
    k = tl.load(K + place[:, None] * k_t + d[None, :] * k_d, mask=(at < keys)[:, None] & in_d, other=0.0)
    last = keys - 1 - (queries - 1 - r if CAUSAL else r * 0)
    if PLACED:
        last = tl.load(AT + r, mask=r < queries, other=0)
    seen = (at[:, None] <= last[None, :]) & (r < queries)[None, :]
    for i in range(GROUP):
        head = kv * GROUP + i
        q = tl.load(Q + head * q_h + r[:, None] * q_q + d[None, :] * q_d, mask=(r < queries)[:, None] & in_d, other=0.0)
        row = (b * heads + head) * queries + r
        top = tl.load(TOP + row, mask=r < queries, other=0.0)
        share = tl.load(SHARE + row, mask=r < queries, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="tf32x3") * scale
        if CAPPED:
            s = cap * tanh(s / cap, True)
        p = tl.where(seen, tl.math.exp2((s - top[None, :]) * 1.4426950408889634) * share[None, :], 0.0)
        line = (b * heads + head).to(tl.int64) * keys
        tl.store(COLUMNS + line + at, tl.sum(p, 1), mask=at < keys)
        if LINES:
            _diagonals(DIAGONALS + line, p, t, keys, queries, BN, WP)


def reasons(q: Tensor, k: Tensor) -> list[str]:
    """Why these kernels cannot compute this; [] = they can."""
    why = device.triton_reasons(q.detach())
    if q.dtype == torch.float64:
        why.append("it computes in float32 at most, and the inputs are float64")
    if q.shape[-1] > 256:
        why.append(f"heads of {q.shape[-1]}; it takes up to 256")
    elif q.dtype == torch.float32 and max(64, q.shape[2]) * triton.next_power_of_2(q.shape[-1]) > 64 * 128:
        found = f"{q.shape[2]} queries in float32, heads of {q.shape[-1]}"
        why.append(f"{found}: more than a multiprocessor holds; it takes 128 of 64, 64 of 128")
    if not 0 < q.shape[2] <= MOST_QUERIES or not q.shape[0]:
        why.append(f"{q.shape[2]} queries of {q.shape[0]} sequences; it takes 1 to {MOST_QUERIES} queries")
    return why


@dataclass(frozen=True)
class Plan:
    """Tiles: rows and keys of the first pass, keys of the second (no fewer than the queries), warps and stages."""

    rows: int
    keys: int
    warps: int
    stages: int
    tile: int
    tile_warps: int


def plan(q: Tensor, rows: int, lines: bool) -> Plan:
    """For rows of 256 bytes as measured on an H200; smaller tiles for larger ones."""
    bytes_of_row = max(16, triton.next_power_of_2(q.shape[-1])) * q.element_size()
    rows = max(16, triton.next_power_of_2(rows))
    if bytes_of_row > 256 or q.element_size() > 2:
        tile = max(64, triton.next_power_of_2(q.shape[2]))
        single = q.shape[2] == 1 and not lines  # multiplied without tensor cores, which takes more registers
        return Plan(min(64, rows), 64 if q.element_size() == 2 else 16 if single else 32, 4, 2, tile, 8)
    narrow = lines and q.shape[2] <= 64
    return Plan(min(128, rows), 64, 4, 3, 64 if narrow else 128, 4 if q.shape[2] <= 64 else 8)


def column_scores(
    q: Float[Tensor, "b h w d"],
    k: Float[Tensor, "b g k d"],
    *,
    scale: float,
    softcap: float | None,
    causal: bool,
    at: Int[Tensor, " w"] | None = None,
) -> Float[Tensor, "b h k"]:
    """See the op's api."""
    return line_sums(q, k, scale=scale, softcap=softcap, causal=causal, lines=False, at=at)[0]


def line_sums(
    q: Float[Tensor, "b h w d"],
    k: Float[Tensor, "b g k d"],
    *,
    scale: float,
    softcap: float | None,
    causal: bool,
    lines: bool,
    at: Int[Tensor, " w"] | None = None,
    how: Plan | None = None,
) -> tuple[Float[Tensor, "b h k"], Float[Tensor, "b h k"]]:
    """Sums over columns, and over diagonals where `lines`, of queries that are the last. `how` is for benchmarks."""
    (b, h, w, d), (g, keys) = q.shape, k.shape[1:3]
    sizes = {"dtype": torch.float32, "device": q.device}
    how = how or plan(q, h // g * w, lines)
    meta = {"GROUP": h // g, "CAUSAL": causal, "CAPPED": softcap is not None, "WIDE": far(k), "D": d}
    meta |= {"DP": max(16, triton.next_power_of_2(d)), "PLACED": at is not None}
    places = q if at is None else at.contiguous()
    shape = [*q.stride(), *k.stride(), scale, softcap or 1.0, keys]
    columns, single = torch.empty(b, h, keys, **sizes), w == 1 and not lines
    top, share = _rows(q, k, columns if single else None, places, shape, meta, how)
    if single:
        _weigh[(triton.cdiv(keys, WEIGHED), b * h)](columns, top, share, keys, BN=WEIGHED, num_warps=4)
        return columns, columns
    diagonals = torch.zeros(b, h, keys, **sizes) if lines else columns
    _add_up[(triton.cdiv(keys, how.tile), b * g)](
        q, k, top, share, columns, diagonals, places, *shape, h, w, LINES=lines, WP=max(16, triton.next_power_of_2(w)),
        BN=how.tile, num_warps=how.tile_warps, num_stages=2, **meta,
    )  # fmt: skip
    return columns, diagonals


def _rows(
    q: Tensor, k: Tensor, logits: Tensor | None, places: Tensor, shape: list[float], meta: dict[str, int], how: Plan
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w"]]:
    """Largest logit and one over the sum of exponentials of every row; all `logits`, if they are asked for."""
    (b, h, w, _), (g, keys) = q.shape, k.shape[1:3]
    blocks = triton.cdiv(h // g * w, how.rows)
    parts = 2 * device.multiprocessors(q.device.index) // (b * g * blocks)
    chunk = triton.cdiv(triton.cdiv(keys, max(1, parts)), how.keys) * how.keys
    parts = triton.cdiv(keys, chunk)
    sizes = {"dtype": torch.float32, "device": q.device}
    stat = torch.empty(b * h * w, parts, 2, **sizes)
    top, share = torch.empty(b, h, w, **sizes), torch.empty(b, h, w, **sizes)
    _normalise[(parts, b * g, blocks)](
        q, k, stat, stat if logits is None else logits, places, *shape, chunk, parts, h, w, KEPT=logits is not None,
        BM=how.rows, BN=how.keys, num_warps=how.warps, num_stages=how.stages, **meta,
    )  # fmt: skip
    _join[(b * h * w,)](stat, top, share, parts, BS=triton.next_power_of_2(parts), num_warps=1)
    return top, share
