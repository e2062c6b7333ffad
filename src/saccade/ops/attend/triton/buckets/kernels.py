"""The kernels for buckets: the step of a tile is that of all lists, its rows and keys are gathered by their places."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attend.triton.kernels import LN2, _gathered, _load, _step, turn


@triton.jit
def _tiles(low, high, BN: tl.constexpr):
    """Tiles in [low, high); 0 where it is empty."""
    return tl.maximum(high - low, 0) // BN


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
    Q_ORDER,  # of all these: [b h places], an axis of size 1 has stride 0
    K_ORDER,
    LOW,
    HIGH,
    HOLE_LOW,
    HOLE_HIGH,
    scale,
    cap,
    heads,
    group,
    queries,
    listed,  # places of keys
    q_b, q_h, q_n,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    do_b, do_h, do_n,
    out_b, out_h, out_n,
    qo_b, qo_h,
    ko_b, ko_h,
    low_b, low_h,
    D: tl.constexpr,
    DVS: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HOLED: tl.constexpr,
    CAPPED: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """BM queries that follow on one another, over the places from the first that one of them sees to the last."""
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    far = head.to(tl.int64)
    kv = far // group
    alive = place < queries
    row = tl.load(Q_ORDER + b * qo_b + far * qo_h + place, mask=alive, other=0)
    edges = b * low_b + far * low_h + place
    low = tl.load(LOW + edges, mask=alive, other=0)
    high = tl.load(HIGH + edges, mask=alive, other=0)
    some = low < high
    first = tl.min(tl.where(some, low, listed))
    last = tl.maximum(tl.max(high), first)
    # every row sees [inner, outer), whole tiles; inner may be up to a tile behind last
    begin = tl.max(tl.where(alive, low, 0))
    end = tl.min(tl.where(alive, high, listed))
    inner = first + (tl.maximum(begin - first, 0) + BN - 1) // BN * BN
    outer = inner + _tiles(inner, end, BN) * BN
    before = outer
    after = outer
    hole_low = low
    hole_high = low
    if HOLED:  # of those, [before, after) with a hole
        hole_low = tl.load(HOLE_LOW + edges, mask=alive, other=0)
        hole_high = tl.load(HOLE_HIGH + edges, mask=alive, other=0)
        hole = hole_low < hole_high
        before = inner + _tiles(inner, tl.minimum(tl.min(tl.where(hole, hole_low, listed)), outer), BN) * BN
        after = before + (tl.maximum(tl.max(tl.where(hole, hole_high, 0)) - before, 0) + BN - 1) // BN * BN
        after = tl.minimum(after, outer)

    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    n = tl.arange(0, BN)
    d_here = d < D
    dv_here = dv < DVS
    at = row.to(tl.int64)
    q = tl.load(
        Q + b * q_b + far * q_h + (at * q_n)[:, None] + d[None, :], mask=alive[:, None] & d_here[None, :], other=0.0
    )
    K += b * k_b + kv * k_h
    V += b * v_b + kv * v_h
    K_ORDER += b * ko_b + far * ko_h
    SIZES: tl.constexpr = D != BD
    V_SIZES: tl.constexpr = DVS != BDV
    k_mask = d_here[:, None]
    rows = (b * heads + far) * queries + at
    aux_part = tl.num_programs(2).to(tl.int64) * heads * queries
    if BACKWARD:
        v_mask = dv_here[:, None]
        do = tl.load(
            DO + b * do_b + far * do_h + (at * do_n)[:, None] + dv[None, :],
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
        v_mask = dv_here[None, :]
        do = q
        rest = row
        m = tl.full([BM], -float("inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BDV], tl.float32)

    early = _tiles(inner, before, BN)
    clear = early + _tiles(after, outer, BN)
    start = tl.where(early > 0, inner, after)
    key = tl.load(K_ORDER + start + n, mask=start + n < listed, other=0)
    for j in range(clear):  # seen by all; keys are looked up a step ahead
        start = tl.where(j + 1 < early, inner + (j + 1) * BN, after + (j + 1 - early) * BN)
        following = tl.load(K_ORDER + start + n, mask=start + n < listed, other=0)
        k, v = _gathered(K, V, key, k_mask, k_n, v_n, d, dv, k_mask, v_mask, False, SIZES, V_SIZES, BACKWARD)
        m, l, acc = _step(
            q, k, v, do, k_mask, key, k_mask, m, l, acc, rest, OUT, OUT, scale, cap, d, dv, k_n, v_n, D, DVS,
            False, CAPPED, BACKWARD, False, WIDE,
        )
        key = following
    left = _tiles(first, inner, BN)
    middle = left + _tiles(before, after, BN)
    for j in range(middle + (tl.maximum(last - outer, 0) + BN - 1) // BN):
        start = tl.where(j < middle, before + (j - left) * BN, outer + (j - middle) * BN)
        start = tl.where(j < left, first + j * BN, start)
        there = start + n
        here = there < last
        key = tl.load(K_ORDER + there, mask=here, other=0)
        seen = (there[None, :] >= low[:, None]) & (there[None, :] < high[:, None])
        if HOLED:
            seen = seen & ((there[None, :] < hole_low[:, None]) | (there[None, :] >= hole_high[:, None]))
        k, v = _gathered(K, V, key, here, k_n, v_n, d, dv, k_mask, v_mask, True, SIZES, V_SIZES, BACKWARD)
        m, l, acc = _step(
            q, k, v, do, seen, key, here, m, l, acc, rest, OUT, OUT, scale, cap, d, dv, k_n, v_n, D, DVS,
            True, CAPPED, BACKWARD, False, WIDE,
        )

    to = OUT + b * out_b + far * out_h + (at * out_n)[:, None]
    if BACKWARD:
        tl.store(to + d[None, :], (acc * scale).to(OUT.dtype.element_ty), mask=alive[:, None] & d_here[None, :])
    else:
        found = l != 0  # true of a NaN
        acc = acc / tl.where(found, l, 1.0)[:, None]
        tl.store(to + dv[None, :], acc.to(OUT.dtype.element_ty), mask=alive[:, None] & dv_here[None, :])
        log = tl.where(found, tl.math.log2(tl.where(found, l, 1.0)), float("inf"))
        m = tl.where(found, m, 0.0)
        if WIDE:
            lse = m + log * LN2
            tl.store(AUX + rows, m, mask=alive)
            tl.store(AUX + aux_part + rows, log, mask=alive)
        else:
            lse = (m + log) * LN2
        tl.store(LSE + rows, tl.where(found, lse, -float("inf")), mask=alive)


@triton.jit
def over_queries(
    Q,
    K,
    V,
    DO,
    LSE,
    AUX,
    DELTA,
    DK,  # [b h k d]: of each query head by itself
    DV,
    Q_ORDER,
    K_ORDER,
    LOW,
    HIGH,
    HOLE_LOW,
    HOLE_HIGH,
    FIRST,  # [b h tiles]: the queries that may see each tile of keys, as places
    LAST,
    scale,
    cap,
    heads,
    group,
    queries,
    listed,
    q_b, q_h, q_n,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    do_b, do_h, do_n,
    dk_b, dk_h, dk_n,
    dv_b, dv_h, dv_n,
    qo_b, qo_h,
    ko_b, ko_h,
    low_b, low_h,
    tile_b, tile_h,
    D: tl.constexpr,
    DVS: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HOLED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dK and dV of BN keys that follow on one another, from all queries of one head."""
    tile = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    far = tl.program_id(1).to(tl.int64)
    kv = far // group
    there = tile * BN + tl.arange(0, BN)
    here = there < listed
    key = tl.load(K_ORDER + b * ko_b + far * ko_h + there, mask=here, other=0).to(tl.int64)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    D_MASK: tl.constexpr = D != BD
    DV_MASK: tl.constexpr = DVS != BDV
    k_mask = here[:, None] & (d < D)[None, :]
    v_mask = here[:, None] & (dv < DVS)[None, :]
    k = tl.load(K + b * k_b + kv * k_h + (key * k_n)[:, None] + d[None, :], mask=k_mask, other=0.0)
    v = tl.load(V + b * v_b + kv * v_h + (key * v_n)[:, None] + dv[None, :], mask=v_mask, other=0.0)
    d_k = tl.zeros([BN, BD], tl.float32)
    d_v = tl.zeros([BN, BDV], tl.float32)
    Q += b * q_b + far * q_h
    DO += b * do_b + far * do_h
    line = (b * heads + far) * queries
    aux_part = tl.num_programs(2).to(tl.int64) * heads * queries
    edges = b * low_b + far * low_h
    first = tl.load(FIRST + b * tile_b + far * tile_h + tile)
    last = tl.load(LAST + b * tile_b + far * tile_h + tile)
    for j in range(first, last, BM):
        place = j + m
        alive = place < last
        row = tl.load(Q_ORDER + b * qo_b + far * qo_h + place, mask=alive, other=0).to(tl.int64)
        low = tl.load(LOW + edges + place, mask=alive, other=0)
        high = tl.load(HIGH + edges + place, mask=alive, other=0)
        seen = (there[:, None] >= low[None, :]) & (there[:, None] < high[None, :])
        if HOLED:
            low = tl.load(HOLE_LOW + edges + place, mask=alive, other=0)
            high = tl.load(HOLE_HIGH + edges + place, mask=alive, other=0)
            seen = seen & ((there[:, None] < low[None, :]) | (there[:, None] >= high[None, :]))
        q = _load(Q + (row * q_n)[:, None] + d[None, :], alive[:, None], (d < D)[None, :], True, D_MASK)
        do = _load(DO + (row * do_n)[:, None] + dv[None, :], alive[:, None], (dv < DVS)[None, :], True, DV_MASK)
        delta = tl.load(DELTA + line + row, mask=alive, other=0.0)
        if WIDE:
            lse = tl.load(AUX + line + row, mask=alive, other=0.0)
            rest = tl.load(AUX + aux_part + line + row, mask=alive, other=float("inf"))
        else:
            lse = tl.load(LSE + line + row, mask=alive, other=float("inf"))
            rest = lse
        d_k, d_v = turn(k, v, q, do, lse, rest, delta, d_k, d_v, scale, cap, seen, True, CAPPED, WIDE)
    dk_at = DK + b * dk_b + far * dk_h + (key * dk_n)[:, None] + d[None, :]
    dv_at = DV + b * dv_b + far * dv_h + (key * dv_n)[:, None] + dv[None, :]
    tl.store(dk_at, (d_k * scale).to(DK.dtype.element_ty), mask=k_mask)
    tl.store(dv_at, d_v.to(DV.dtype.element_ty), mask=v_mask)
