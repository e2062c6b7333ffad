"""The kernels: one that walks over the keys of some queries (forward, and dQ), one that walks over the queries of some
keys (dK and dV), and the row sums that the backward pass needs.

Sums are in float32, exponentials to the base 2. With S the scaled logits in units of log 2:

    forward   m' = max(m, rowmax S),  P = 2^(S - m'),  l' = l 2^(m - m') + rowsum P,  O' = O 2^(m - m') + P V
    backward  P = 2^(S - lse),  dP = dO V^T,  dS = P (dP - delta),  delta = rowsum(dO O) - dlse
              dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

In float32 S is in natural units until m is taken off, and the two halves of lse, m and log2 l, are kept apart (AUX): a
rounding of either would be in all of a row.
A pair that must not be seen has S = -inf; a row that has seen nothing yet has m = -inf, and is taken off 0 instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.tanh import tanh
from saccade.ops.unclaimed import unclaimed

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SCANNED: tl.constexpr = tl.constexpr(256)  # entries of a list that are counted at a time


@triton.jit
def _load(at, rows, sizes, ROWS: tl.constexpr, SIZES: tl.constexpr):
    """A tile; zeros outside. A mask that is always true is left out: it costs registers."""
    if ROWS and SIZES:
        return tl.load(at, mask=rows & sizes, other=0.0)
    if ROWS:
        return tl.load(at, mask=rows, other=0.0)
    if SIZES:
        return tl.load(at, mask=sizes, other=0.0)
    return tl.load(at)


@triton.jit
def _count(entries, n, whole, seen, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """Of ascending key blocks, without entries of -1: how many end by `whole`, and how many begin before `seen`."""
    here = tl.arange(0, SCANNED)
    ends = tl.zeros([SCANNED], tl.int32)
    begins = tl.zeros([SCANNED], tl.int32)
    for j in range(0, n, SCANNED):
        e = tl.load(entries + j + here, mask=j + here < n, other=-1)
        ends += ((e >= 0) & (e * STEP + WIDTH <= whole)).to(tl.int32)
        begins += ((e >= 0) & (e * STEP < seen)).to(tl.int32)
    return tl.sum(ends), tl.sum(begins)


@triton.jit
def _used(index, bits, n, whole, seen, MARKED: tl.constexpr):
    """The place behind the last key of a list that counts and is before `seen`; and up to which place all count and are
    before `whole`."""
    here = tl.arange(0, SCANNED)
    last = tl.zeros([SCANNED], tl.int32)
    clear = tl.zeros([SCANNED], tl.int32) + n
    for j in range(0, n, SCANNED):
        key = tl.load(index + j + here, mask=j + here < n, other=-1)
        if MARKED:
            word = tl.load(bits + (j + here) // 32, mask=j + here < n, other=0)
            key = tl.where(((word >> ((j + here) % 32)) & 1) > 0, key, -1)
        last = tl.maximum(last, tl.where((key >= 0) & (key < seen), j + here + 1, 0))
        clear = tl.minimum(clear, tl.where((key >= 0) & (key < whole), n, j + here))
    return tl.max(last), tl.min(clear)


@triton.jit
def _step(
    q,  # [m d]
    k,  # [d n]
    v,  # [n dv] forward, [dv n] backward
    do,  # [m dv]
    seen,  # [m n]: which pairs are computed, where MASKED
    keys,  # [n]
    here,  # [n]: which of those are keys, where MASKED
    m,  # [m] forward: largest logit so far; backward: lse
    l,  # [m] forward: sum so far; backward: delta
    acc,  # [m dv] forward: O; [m d] backward: dQ
    rest,  # [m] what is to be taken off beside m, where WIDE
    DK,
    DV,
    scale,
    cap,
    k_sizes,
    v_sizes,
    dk_row,
    dv_row,
    D: tl.constexpr,
    DVS: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    BACKWARD: tl.constexpr,
    ATOMIC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of keys."""
    s = tl.dot(q, k, input_precision="ieee")
    log: tl.constexpr = 1.0 if WIDE else LOG2E
    unit = scale * log
    if CAPPED:
        t = tanh(s * (scale / cap), WIDE)
        s = t * (cap * log)
        unit = 1.0
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
    if BACKWARD:
        s = s * unit - m[:, None]
        if WIDE:
            s = s * LOG2E - rest[:, None]
        p = tl.math.exp2(s)
        dp = tl.dot(do, v, input_precision="ieee")
        ds = p * (dp - l[:, None])
        if CAPPED:
            ds = ds * (1 - t * t)
        ds = ds.to(k.dtype)
        acc = tl.dot(ds, tl.trans(k), acc, input_precision="ieee")
        if ATOMIC:
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * scale
            at = keys.to(tl.int64)[:, None]
            if MASKED:
                kept = here[:, None]
            else:
                kept = (keys >= 0)[:, None]
            tl.atomic_add(DV + at * dv_row + v_sizes[None, :], dv, mask=kept & (v_sizes < DVS)[None, :], sem="relaxed")
            tl.atomic_add(DK + at * dk_row + k_sizes[None, :], dk, mask=kept & (k_sizes < D)[None, :], sem="relaxed")
    else:
        top = tl.maximum(m, tl.max(s, 1) * unit)
        if MASKED:
            base = tl.where(top == -float("inf"), 0.0, top)
        else:
            base = top
        if WIDE:
            p = tl.math.exp2((s * unit - base[:, None]) * LOG2E)
            shrink = tl.math.exp2((m - base) * LOG2E)
        else:
            p = tl.math.exp2(s * unit - base[:, None])
            shrink = tl.math.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = top
    return m, l, acc


@triton.jit
def over_keys(
    Q,
    K,
    V,
    DO,
    OUT,  # forward: O; backward: dQ
    LSE,  # backward: in units of log 2
    AUX,  # [2 b h q] m and log2 l, where WIDE
    DELTA,
    DK,
    DV,
    HEADS,  # [slots] query head of each, where MAPPED
    CROW,  # of COL, where CSR; else how many each query block has
    COL,
    INDEX,
    BITS,
    RANGES,
    SINKS,
    WINDOW,
    scale,
    cap,
    heads,
    group,
    queries,
    keys,
    q_block,
    blocks,  # query blocks
    listed,  # entries of a row of INDEX
    ranges,
    q_b, q_h, q_n,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    do_b, do_h, do_n,
    out_b, out_h, out_n,
    dk_b, dk_h, dk_n,
    dv_b, dv_h, dv_n,
    crow_b, crow_h,
    col_b, col_h, col_i,
    index_b, index_h, index_i,
    bits_b, bits_h, bits_i,
    ranges_b, ranges_h, ranges_i,
    span_h,
    D: tl.constexpr,
    DVS: tl.constexpr,
    BD: tl.constexpr,  # head sizes, up to powers of two
    BDV: tl.constexpr,
    BM: tl.constexpr,  # rows of a tile: PACK heads of ROWS queries
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    PACK: tl.constexpr,
    SLOTS: tl.constexpr,  # programs that share keys and lie side by side
    SUB: tl.constexpr,  # tiles of a query block
    RUNS: tl.constexpr,  # 1: whole tiles of keys, 2: key by key
    STEP: tl.constexpr,  # keys between the entries of COL, and keys of each
    WIDTH: tl.constexpr,
    CSR: tl.constexpr,
    COLUMNS: tl.constexpr,
    MARKED: tl.constexpr,  # columns have a bit each that says whether they count
    RANGED: tl.constexpr,
    SPANS: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    MAPPED: tl.constexpr,
    BACKWARD: tl.constexpr,
    ATOMIC: tl.constexpr,
    WIDE: tl.constexpr,
    START: tl.constexpr,  # forward: OUT and LSE hold what other keys gave
):
    """Some queries of one list, over all keys of that list. Programs that read the same keys are neighbours."""
    x = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    tile = blocks * SUB - 1 - x // SLOTS  # causal lists are longest at the end: those first
    block = tile // SUB
    if MAPPED:
        line = tl.program_id(1)
        head0 = tl.load(HEADS + line)
        kv = head0 // group
    else:
        kv = tl.program_id(1)
        head0 = kv * group + (x % SLOTS) * PACK
        line = head0
    offset = keys - queries
    q0 = block * q_block + (tile % SUB) * ROWS
    end = tl.minimum(tl.minimum(q0 + ROWS, (block + 1) * q_block), queries)
    if q0 >= end:  # the last query block is cut short
        return
    r = tl.arange(0, BM)
    row = q0 + r % ROWS
    member = r // ROWS
    head = head0 + member
    alive = (row < end) & (member < PACK) & (head < (kv + 1) * group)
    position = row + offset
    if CAUSAL:
        whole = q0 + offset + 1  # keys before it are seen by every row, and those from `before` on by none
        before = end + offset
    else:
        whole = keys
        before = keys

    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    n = tl.arange(0, BN)
    within = unclaimed(BN)
    d_here = d < D
    dv_here = dv < DVS
    far = head.to(tl.int64)
    at = row.to(tl.int64)
    q = tl.load(
        Q + b * q_b + (far * q_h + at * q_n)[:, None] + d[None, :], mask=alive[:, None] & d_here[None, :], other=0.0
    )
    K += b * k_b + kv.to(tl.int64) * k_h
    V += b * v_b + kv.to(tl.int64) * v_h
    DK += b * dk_b + kv.to(tl.int64) * dk_h
    DV += b * dv_b + kv.to(tl.int64) * dv_h
    k_at = K + n[None, :] * k_n + d[:, None]
    SIZES: tl.constexpr = D != BD
    V_SIZES: tl.constexpr = DVS != BDV
    k_mask = d_here[:, None]
    rows = (b * heads + far) * queries + at
    aux_part = tl.num_programs(2).to(tl.int64) * heads * queries
    if BACKWARD:
        v_at = V + n[None, :] * v_n + dv[:, None]
        v_mask = dv_here[:, None]
        do = tl.load(
            DO + b * do_b + (far * do_h + at * do_n)[:, None] + dv[None, :],
            mask=alive[:, None] & dv_here[None, :],
            other=0.0,
        )
        if WIDE:
            m = tl.load(AUX + rows, mask=alive, other=0.0)
            rest = tl.load(AUX + aux_part + rows, mask=alive, other=float("inf"))
        else:
            m = tl.load(LSE + rows, mask=alive, other=float("inf"))
            rest = m
        l = tl.load(DELTA + rows, mask=alive, other=0.0)
        acc = tl.zeros([BM, BD], tl.float32)
    else:
        v_at = V + n[:, None] * v_n + dv[None, :]
        v_mask = dv_here[None, :]
        do = q
        rest = position
        if START:
            m = tl.load(LSE + rows, mask=alive, other=-float("inf")) * LOG2E
            l = tl.where(m == -float("inf"), 0.0, 1.0)
            before_it = OUT + b * out_b + (far * out_h + at * out_n)[:, None] + dv[None, :]
            acc = tl.load(before_it, mask=alive[:, None] & dv_here[None, :], other=0.0).to(tl.float32)
        else:
            m = tl.full([BM], -float("inf"), tl.float32)
            l = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, BDV], tl.float32)

    if RUNS:
        entries = COL + b * col_b + line.to(tl.int64) * col_h
        if CSR:
            crow = CROW + b * crow_b + line.to(tl.int64) * crow_h + block
            first = tl.load(crow)
            many = tl.load(crow + 1) - first
            entries += first
        else:
            entries += block.to(tl.int64) * col_i
            many = tl.load(CROW + b * crow_b + line.to(tl.int64) * crow_h + block)
        n_whole, n_seen = _count(entries, many, whole, before, STEP, WIDTH)
    if RUNS == 1:
        R: tl.constexpr = WIDTH // BN
        for j in range(n_whole * R):
            start = tl.load(entries + j // R) * STEP + (j % R) * BN
            k = _load(k_at + start.to(tl.int64) * k_n, k_mask, k_mask, False, SIZES)
            v = _load(v_at + start.to(tl.int64) * v_n, v_mask, v_mask, False, V_SIZES)
            m, l, acc = _step(
                q, k, v, do, k_mask, start + n, k_mask, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                False, CAPPED, BACKWARD, ATOMIC, WIDE,
            )
        for j in range(n_whole * R, n_seen * R):
            start = tl.load(entries + j // R) * STEP + (j % R) * BN
            key = start + n
            here = key < keys
            if CAUSAL:
                seen = key[None, :] <= position[:, None]
            else:
                seen = here[None, :] & (row >= 0)[:, None]
            if BACKWARD:
                v_here = here[None, :]
            else:
                v_here = here[:, None]
            k = _load(k_at + start.to(tl.int64) * k_n, here[None, :], k_mask, True, SIZES)
            v = _load(v_at + start.to(tl.int64) * v_n, v_here, v_mask, True, V_SIZES)
            m, l, acc = _step(
                q, k, v, do, seen, key, here, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                True, CAPPED, BACKWARD, ATOMIC, WIDE,
            )
    if RUNS == 2:
        clear = n_whole * WIDTH // BN * BN
        key = tl.load(entries + n // WIDTH, mask=n < clear, other=0) * STEP + within % WIDTH
        for j in range(0, clear, BN):
            after = j + BN + n  # keys are looked up a step ahead: their loads wait for them
            following = tl.load(entries + after // WIDTH, mask=after < clear, other=0)
            following = following * STEP + (j + BN + within) % WIDTH
            k, v = _gathered(K, V, key, k_mask, k_n, v_n, d, dv, k_mask, v_mask, False, SIZES, V_SIZES, BACKWARD)
            m, l, acc = _step(
                q, k, v, do, k_mask, key, k_mask, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                False, CAPPED, BACKWARD, ATOMIC, WIDE,
            )
            key = following
        for j in range(clear, n_seen * WIDTH, BN):
            entry = tl.load(entries + (j + n) // WIDTH, mask=j + n < n_seen * WIDTH, other=-1)
            key = entry * STEP + (j + within) % WIDTH
            here = (entry >= 0) & (key < keys)
            key = tl.where(here, key, 0)
            seen = here[None, :] & (row >= 0)[:, None]
            if CAUSAL:
                seen = here[None, :] & (key[None, :] <= position[:, None])
            k, v = _gathered(K, V, key, here, k_n, v_n, d, dv, k_mask, v_mask, True, SIZES, V_SIZES, BACKWARD)
            m, l, acc = _step(
                q, k, v, do, seen, key, here, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                True, CAPPED, BACKWARD, ATOMIC, WIDE,
            )
    if COLUMNS:
        index = INDEX + b * index_b + line.to(tl.int64) * index_h + block.to(tl.int64) * index_i
        bits = BITS + b * bits_b + line.to(tl.int64) * bits_h + block.to(tl.int64) * bits_i
        many, clear = _used(index, bits, listed, whole, before, MARKED)
        clear = clear // BN * BN
        key = tl.load(index + n, mask=n < clear, other=0)
        for j in range(0, clear, BN):
            following = tl.load(index + j + BN + n, mask=j + BN + n < clear, other=0)
            k, v = _gathered(K, V, key, k_mask, k_n, v_n, d, dv, k_mask, v_mask, False, SIZES, V_SIZES, BACKWARD)
            m, l, acc = _step(
                q, k, v, do, k_mask, key, k_mask, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                False, CAPPED, BACKWARD, ATOMIC, WIDE,
            )
            key = following
        for j in range(clear, many, BN):
            key = tl.load(index + j + n, mask=j + n < many, other=-1)
            here = (key >= 0) & (key < keys)
            if MARKED:
                word = tl.load(bits + (j + n) // 32, mask=j + n < many, other=0)
                here = here & (((word >> ((j + n) % 32)) & 1) > 0)
            key = tl.where(here, key, 0)
            seen = here[None, :] & (row >= 0)[:, None]
            if CAUSAL:
                seen = here[None, :] & (key[None, :] <= position[:, None])
            k, v = _gathered(K, V, key, here, k_n, v_n, d, dv, k_mask, v_mask, True, SIZES, V_SIZES, BACKWARD)
            m, l, acc = _step(
                q, k, v, do, seen, key, here, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                True, CAPPED, BACKWARD, ATOMIC, WIDE,
            )
    if RANGED:
        pairs = RANGES + b * ranges_b + line.to(tl.int64) * ranges_h + block.to(tl.int64) * ranges_i
        for e in range(ranges):
            low = tl.maximum(tl.load(pairs + 2 * e), 0)
            high = tl.minimum(tl.minimum(tl.load(pairs + 2 * e + 1), keys), before)
            inner = low + tl.maximum(tl.minimum(high, whole) - low, 0) // BN * BN
            for j in range((inner - low) // BN):
                start = low + j * BN
                k = _load(k_at + start.to(tl.int64) * k_n, k_mask, k_mask, False, SIZES)
                v = _load(v_at + start.to(tl.int64) * v_n, v_mask, v_mask, False, V_SIZES)
                m, l, acc = _step(
                    q, k, v, do, k_mask, start + n, k_mask, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n,
                    D, DVS, False, CAPPED, BACKWARD, ATOMIC, WIDE,
                )
            for j in range((tl.maximum(high - inner, 0) + BN - 1) // BN):
                start = inner + j * BN
                key = start + n
                here = key < high
                seen = here[None, :] & (row >= 0)[:, None]
                if CAUSAL:
                    seen = here[None, :] & (key[None, :] <= position[:, None])
                if BACKWARD:
                    v_here = here[None, :]
                else:
                    v_here = here[:, None]
                k = _load(k_at + start.to(tl.int64) * k_n, here[None, :], k_mask, True, SIZES)
                v = _load(v_at + start.to(tl.int64) * v_n, v_here, v_mask, True, V_SIZES)
                m, l, acc = _step(
                    q, k, v, do, seen, key, here, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                    True, CAPPED, BACKWARD, ATOMIC, WIDE,
                )
    if SPANS:
        window = tl.load(WINDOW + line * span_h)
        sinks = tl.minimum(tl.load(SINKS + line * span_h), before)
        p0 = q0 + offset
        low = tl.maximum(p0 - window + 1, 0) // BN * BN
        if CAUSAL:
            high = before
            full = whole
        else:
            high = tl.maximum(tl.minimum(keys, end + offset - 1 + window), sinks)
            full = tl.minimum(keys, p0 + window)
        inner = tl.maximum((tl.maximum(end + offset - window, 0) + BN - 1) // BN * BN, low)
        outer = tl.maximum(full // BN * BN, inner)
        for j in range((outer - inner) // BN):
            start = inner + j * BN
            k = _load(k_at + start.to(tl.int64) * k_n, k_mask, k_mask, False, SIZES)
            v = _load(v_at + start.to(tl.int64) * v_n, v_mask, v_mask, False, V_SIZES)
            m, l, acc = _step(
                q, k, v, do, k_mask, start + n, k_mask, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                False, CAPPED, BACKWARD, ATOMIC, WIDE,
            )
        sunk = tl.minimum((sinks + BN - 1) // BN, low // BN)
        early = sunk + (inner - low) // BN
        late = early + tl.maximum(high - outer + BN - 1, 0) // BN
        for j in range(late):
            start = tl.where(j < sunk, j * BN, tl.where(j < early, low + (j - sunk) * BN, outer + (j - early) * BN))
            key = start + n
            here = key < keys
            behind = position[:, None] - key[None, :]
            if CAUSAL:
                seen = (behind >= 0) & ((behind < window) | (key < sinks)[None, :])
            else:
                seen = here[None, :] & ((tl.abs(behind) < window) | (key < sinks)[None, :])
            if BACKWARD:
                v_here = here[None, :]
            else:
                v_here = here[:, None]
            k = _load(k_at + start.to(tl.int64) * k_n, here[None, :], k_mask, True, SIZES)
            v = _load(v_at + start.to(tl.int64) * v_n, v_here, v_mask, True, V_SIZES)
            m, l, acc = _step(
                q, k, v, do, seen, key, here, m, l, acc, rest, DK, DV, scale, cap, d, dv, dk_n, dv_n, D, DVS,
                True, CAPPED, BACKWARD, ATOMIC, WIDE,
            )

    place = OUT + b * out_b + (far * out_h + at * out_n)[:, None]
    if BACKWARD:
        tl.store(place + d[None, :], (acc * scale).to(OUT.dtype.element_ty), mask=alive[:, None] & d_here[None, :])
    else:
        some = l != 0  # true of a NaN
        acc = acc / tl.where(some, l, 1.0)[:, None]
        tl.store(place + dv[None, :], acc.to(OUT.dtype.element_ty), mask=alive[:, None] & dv_here[None, :])
        log = tl.where(some, tl.math.log2(tl.where(some, l, 1.0)), float("inf"))
        m = tl.where(some, m, 0.0)
        if WIDE:
            lse = m + log * LN2
        else:
            lse = (m + log) * LN2
        tl.store(LSE + rows, tl.where(some, lse, -float("inf")), mask=alive)
        if WIDE:
            tl.store(AUX + rows, m, mask=alive)
            tl.store(AUX + aux_part + rows, log, mask=alive)


@triton.jit
def _gathered(
    K,
    V,
    key,  # [n]
    here,  # [n]: which of them are keys, where ROWS
    k_n,
    v_n,
    d,
    dv,
    k_mask,
    v_mask,
    ROWS: tl.constexpr,
    SIZES: tl.constexpr,
    V_SIZES: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Keys [d n] and values ([n dv], backward [dv n]) from anywhere."""
    at = key.to(tl.int64)
    if ROWS:
        k_here = here[None, :]
        v_here = here[None, :] if BACKWARD else here[:, None]
    else:
        k_here = k_mask
        v_here = v_mask
    k = _load(K + (at * k_n)[None, :] + d[:, None], k_here, k_mask, ROWS, SIZES)
    if BACKWARD:
        v = _load(V + (at * v_n)[None, :] + dv[:, None], v_here, v_mask, ROWS, V_SIZES)
    else:
        v = _load(V + (at * v_n)[:, None] + dv[None, :], v_here, v_mask, ROWS, V_SIZES)
    return k, v


@triton.jit
def row_sums(O, DO, LSE, DLSE, DELTA, BASE, heads, queries, o_b, o_h, o_n, do_b, do_h, do_n, DVS: tl.constexpr,
             BDV: tl.constexpr, BM: tl.constexpr):
    """delta = rowsum(dO O) - dlse, [b h q]; and lse in units of log 2, inf for a row that sees nothing: its P is 0."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    dv = tl.arange(0, BDV)
    alive = row < queries
    mask = alive[:, None] & (dv < DVS)[None, :]
    far = row.to(tl.int64)[:, None]
    o = tl.load(O + b * o_b + head.to(tl.int64) * o_h + far * o_n + dv[None, :], mask=mask, other=0.0)
    do = tl.load(DO + b * do_b + head.to(tl.int64) * do_h + far * do_n + dv[None, :], mask=mask, other=0.0)
    at = (b * heads + head) * queries + row
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - tl.load(DLSE + at, mask=alive, other=0.0)
    tl.store(DELTA + at, delta, mask=alive)
    lse = tl.load(LSE + at, mask=alive, other=0.0) * LOG2E
    tl.store(BASE + at, tl.where(lse == -float("inf"), float("inf"), lse), mask=alive)


@triton.jit
def turn(
    k,  # [n d]
    v,  # [n dv]
    q,  # [m d]
    do,  # [m dv]
    lse,  # [m]
    rest,  # [m] what is to be taken off beside lse, where WIDE
    delta,  # [m]
    dk,
    dv,
    scale,
    cap,
    seen,  # [n m] or anything
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of queries onto dK and dV."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    log: tl.constexpr = 1.0 if WIDE else LOG2E
    unit = scale * log
    if CAPPED:
        t = tanh(s * (scale / cap), WIDE)
        s = t * (cap * log)
        unit = 1.0
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
    s = s * unit - lse[None, :]
    if WIDE:
        s = s * LOG2E - rest[None, :]
    p = tl.math.exp2(s)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    if CAPPED:
        ds = ds * (1 - t * t)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _turned(
    k,  # [n d]
    v,  # [n dv]
    Q,  # of a head, or descriptors of all
    DO,
    b,
    head,
    LSE,
    AUX,
    DELTA,
    aux_part,
    q0,
    m,  # arange over the rows of a tile
    queries,
    q_n,
    do_n,
    q_mask,
    do_mask,
    dk,
    dv,
    scale,
    cap,
    D_MASK: tl.constexpr,
    DV_MASK: tl.constexpr,
    seen,  # [n m] or anything
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Queries q0 + m onto dK and dV."""
    row = q0 + m
    alive = row < queries
    at = row.to(tl.int64)
    if DESCRIBED:
        q = Q.load([b, head, q0, 0]).reshape([m.shape[0], k.shape[1]])
        do = DO.load([b, head, q0, 0]).reshape([m.shape[0], v.shape[1]])
    else:
        q = _load(Q + (at * q_n)[:, None] + q_mask[0], alive[:, None], q_mask[1], True, D_MASK)
        do = _load(DO + (at * do_n)[:, None] + do_mask[0], alive[:, None], do_mask[1], True, DV_MASK)
    if DESCRIBED:  # as plain loads these two are a copy for each thread and row
        lse = LSE.load([b, head, q0]).reshape([m.shape[0]])
        delta = DELTA.load([b, head, q0]).reshape([m.shape[0]])
    elif WIDE:
        lse = tl.load(AUX + row, mask=alive, other=0.0)
        rest = tl.load(AUX + aux_part + row, mask=alive, other=float("inf"))
        delta = tl.load(DELTA + row, mask=alive, other=0.0)
    else:
        lse = tl.load(LSE + row, mask=alive, other=float("inf"))
        delta = tl.load(DELTA + row, mask=alive, other=0.0)
    if not WIDE:
        rest = lse
    return turn(k, v, q, do, lse, rest, delta, dk, dv, scale, cap, seen, MASKED, CAPPED, WIDE)


@triton.jit
def over_queries(
    Q,  # and DO: pointers, or descriptors of [b h q d] in tiles [1 1 BM D], which take fewer registers
    K,
    V,
    DO,
    LSE,
    AUX,
    DELTA,
    DK,
    DV,
    HEADS,
    FIRST,  # [kv heads + 1]: where the slots of each key/value head begin, where MAPPED
    CROW,  # lists of query blocks, for each key block
    ROW,
    PIECES,  # [b pieces 3]: key block of a key/value head, first entry, place in PARTS; not with SPANS
    PARTS,  # [b places tiles 2 BN D]
    SINKS,
    WINDOW,
    piece_b,
    places,
    most,  # entries of a piece
    scale,
    cap,
    heads,
    group,
    queries,
    keys,
    q_b, q_h, q_n,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    do_b, do_h, do_n,
    dk_b, dk_h, dk_n,
    dv_b, dv_h, dv_n,
    crow_b, crow_h,
    row_b, row_h,
    span_h,
    D: tl.constexpr,
    DVS: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    MAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """dK and dV of some keys, over all queries of all heads that look at them, or a piece of those."""
    batch = tl.program_id(2)
    b = batch.to(tl.int64)
    if SPANS:
        n0 = tl.program_id(0) * BN
        kv = tl.program_id(1)
        place = -1
    else:
        T: tl.constexpr = K_BLOCK // BN
        sub = tl.program_id(0) % T
        piece = PIECES + b * piece_b + tl.program_id(0) // T * 3
        begin = tl.load(piece)
        if begin < 0:  # fewer pieces than there is room for
            return
        key_blocks = (keys + K_BLOCK - 1) // K_BLOCK
        kv = begin // key_blocks
        n0 = begin % key_blocks * K_BLOCK + sub * BN
        begin = tl.load(piece + 1)
        place = tl.load(piece + 2)
    offset = keys - queries
    m = tl.arange(0, BM)
    key = n0 + tl.arange(0, BN)
    n1 = tl.minimum(n0 + BN, keys)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    far = key.to(tl.int64)[:, None]
    k_mask = (key < keys)[:, None] & (d < D)[None, :]
    v_mask = (key < keys)[:, None] & (dv < DVS)[None, :]
    k = tl.load(K + b * k_b + kv.to(tl.int64) * k_h + far * k_n + d[None, :], mask=k_mask, other=0.0)
    v = tl.load(V + b * v_b + kv.to(tl.int64) * v_h + far * v_n + dv[None, :], mask=v_mask, other=0.0)
    d_k = tl.zeros([BN, BD], tl.float32)
    d_v = tl.zeros([BN, BDV], tl.float32)
    q_mask = (d[None, :], (d < D)[None, :])
    do_mask = (dv[None, :], (dv < DVS)[None, :])
    D_MASK: tl.constexpr = D != BD
    DV_MASK: tl.constexpr = DVS != BDV
    aux_part = tl.num_programs(2).to(tl.int64) * heads * queries
    if MAPPED:
        slot0 = tl.load(FIRST + kv)
        slots = tl.load(FIRST + kv + 1) - slot0
    else:
        slot0 = kv * group
        slots = group
    for s in range(slots):
        line = slot0 + s
        if MAPPED:
            head = tl.load(HEADS + line)
        else:
            head = line
        if DESCRIBED:
            q_at = Q
            do_at = DO
            lse_at = LSE
            delta_at = DELTA
        else:
            q_at = Q + b * q_b + head.to(tl.int64) * q_h
            do_at = DO + b * do_b + head.to(tl.int64) * do_h
            lse_at = LSE + (b * heads + head) * queries
            delta_at = DELTA + (b * heads + head) * queries
        row0 = (b * heads + head) * queries
        if SPANS:
            window = tl.load(WINDOW + line * span_h)
            sinks = tl.load(SINKS + line * span_h)
            low = n0
            high = n1 - 1 + window
            full_low = n1 - 1
            full_high = n0 + window
            if not CAUSAL:
                low = n0 - window + 1
                full_low = n1 - window
            if n0 < sinks:
                high = keys
                if not CAUSAL:
                    low = offset  # also of queries that lie before all keys
            if n1 <= sinks:
                full_high = keys
                if not CAUSAL:
                    full_low = offset
            low = tl.maximum(low - offset, 0) // BM * BM
            high = tl.minimum(high, keys) - offset
            inner = tl.maximum((tl.maximum(full_low - offset, 0) + BM - 1) // BM * BM, low)
            outer = tl.maximum(tl.maximum(tl.minimum(full_high, keys) - offset, 0) // BM * BM, inner)
            for j in range((outer - inner) // BM):
                q0 = inner + j * BM
                d_k, d_v = _turned(
                    k, v, q_at, do_at, batch, head, lse_at, AUX + row0, delta_at, aux_part, q0, m, queries, q_n, do_n,
                    q_mask, do_mask, d_k, d_v, scale, cap, D_MASK, DV_MASK, k_mask, False, CAPPED, WIDE, DESCRIBED,
                )
            early = (inner - low) // BM
            late = early + tl.maximum(high - outer + BM - 1, 0) // BM
            for j in range(late):
                q0 = tl.where(j < early, low + j * BM, outer + (j - early) * BM)
                behind = (q0 + m + offset)[None, :] - key[:, None]
                if CAUSAL:
                    seen = (behind >= 0) & ((behind < window) | (key < sinks)[:, None])
                else:
                    seen = (tl.abs(behind) < window) | (key < sinks)[:, None]
                d_k, d_v = _turned(
                    k, v, q_at, do_at, batch, head, lse_at, AUX + row0, delta_at, aux_part, q0, m, queries, q_n, do_n,
                    q_mask, do_mask, d_k, d_v, scale, cap, D_MASK, DV_MASK, seen, True, CAPPED, WIDE, DESCRIBED,
                )
        else:
            R: tl.constexpr = Q_BLOCK // BM
            crow = CROW + b * crow_b + line.to(tl.int64) * crow_h + n0 // K_BLOCK
            first = tl.load(crow)
            many = tl.load(crow + 1) - first
            entries = ROW + b * row_b + line.to(tl.int64) * row_h + first
            low = tl.minimum(tl.maximum(begin, 0), many)
            high = tl.minimum(tl.maximum(begin + most, 0), many)
            begin -= many
            partly = low
            if CAUSAL:  # query blocks that end before the first key, and those that begin before the last
                hidden, partly = _count(entries, many, n0 - offset, n1 - 1 - offset, Q_BLOCK, Q_BLOCK)
                low = tl.maximum(low, hidden)
                partly = tl.maximum(partly, low)
            for j in range(low * R, tl.minimum(partly, high) * R):
                q0 = tl.load(entries + j // R) * Q_BLOCK + (j % R) * BM
                seen = key[:, None] <= (q0 + m + offset)[None, :]
                d_k, d_v = _turned(
                    k, v, q_at, do_at, batch, head, lse_at, AUX + row0, delta_at, aux_part, q0, m, queries, q_n, do_n,
                    q_mask, do_mask, d_k, d_v, scale, cap, D_MASK, DV_MASK, seen, True, CAPPED, WIDE, DESCRIBED,
                )
            for j in range(partly * R, high * R):
                q0 = tl.load(entries + j // R) * Q_BLOCK + (j % R) * BM
                d_k, d_v = _turned(
                    k, v, q_at, do_at, batch, head, lse_at, AUX + row0, delta_at, aux_part, q0, m, queries, q_n, do_n,
                    q_mask, do_mask, d_k, d_v, scale, cap, D_MASK, DV_MASK, k_mask, False, CAPPED, WIDE, DESCRIBED,
                )
    if place < 0:
        dk_at = DK + b * dk_b + kv.to(tl.int64) * dk_h + far * dk_n + d[None, :]
        dv_at = DV + b * dv_b + kv.to(tl.int64) * dv_h + far * dv_n + dv[None, :]
        tl.store(dk_at, (d_k * scale).to(DK.dtype.element_ty), mask=k_mask)
        tl.store(dv_at, d_v.to(DV.dtype.element_ty), mask=v_mask)
    else:
        n = tl.arange(0, BN)[:, None]
        part = PARTS + ((b * places + place) * (K_BLOCK // BN) + n0 % K_BLOCK // BN) * (BN * (BD + BDV))
        tl.store(part + n * BD + d[None, :], d_k)
        tl.store(part + BN * BD + n * BDV + dv[None, :], d_v)


@triton.jit
def joined(
    DK,
    DV,
    PARTS,
    OF,  # [b blocks 2]: the first place, and how many
    of_b,
    places,
    scale,
    keys,
    dk_b, dk_h, dk_n,
    dv_b, dv_h, dv_n,
    D: tl.constexpr,
    DVS: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    K_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """dK and dV of keys whose queries were taken in pieces: their sums, always in the same order."""
    T: tl.constexpr = K_BLOCK // BN
    b = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0)
    at = OF + b * of_b + block * 2
    place = tl.load(at)
    many = tl.load(at + 1)
    if many < 2:
        return
    key_blocks = (keys + K_BLOCK - 1) // K_BLOCK
    kv = (block // key_blocks).to(tl.int64)
    n = tl.program_id(1) * STEP + tl.arange(0, STEP)[:, None]
    key = block % key_blocks * K_BLOCK + n
    d = tl.arange(0, BD)[None, :]
    dv = tl.arange(0, BDV)[None, :]
    d_k = tl.zeros([STEP, BD], tl.float32)
    d_v = tl.zeros([STEP, BDV], tl.float32)
    part = PARTS + ((b * places + place) * T + n // BN) * (BN * (BD + BDV))
    for _ in range(many):
        d_k += tl.load(part + n % BN * BD + d)
        d_v += tl.load(part + BN * BD + n % BN * BDV + dv)
        part += T * BN * (BD + BDV)
    far = key.to(tl.int64)
    dk_at = DK + b * dk_b + kv * dk_h + far * dk_n + d
    dv_at = DV + b * dv_b + kv * dv_h + far * dv_n + dv
    tl.store(dk_at, (d_k * scale).to(DK.dtype.element_ty), mask=(key < keys) & (d < D))
    tl.store(dv_at, d_v.to(DV.dtype.element_ty), mask=(key < keys) & (dv < DVS))
