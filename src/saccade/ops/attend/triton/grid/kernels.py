"""The kernels for a grid, on any device: one walks over the keys of some queries (forward, and dQ), one over the
queries of some keys (dK and dV). What a step computes is that of the kernels for lists.

Boxes of a step begin where what is seen begins, so they lie across one another from program to program, and fewer are
touched than if all grids were cut alike. Those of which every pair is seen come first, without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attend.triton.kernels import LN2, _load, _step, _turned


@triton.jit
def reach(c, cells, wide, TURNED: tl.constexpr):
    """First and last cell along an axis that cell c sees; TURNED: that see it."""
    if TURNED:
        first = tl.where(c < wide, 0, c - wide + 1 + wide // 2)
        last = tl.where(c >= cells - wide, cells - 1, c + wide // 2)
    else:
        first = tl.minimum(tl.maximum(c - wide // 2, 0), tl.maximum(cells - wide, 0))
        last = tl.minimum(first + wide, cells) - 1
    return first, last


@triton.jit
def own(tile, size, gap, BOX: tl.constexpr):
    """Along one axis, of box number `tile`: remainder, cells of that remainder, first cell; and what is left of the
    number for the axes before."""
    along = ((size + gap - 1) // gap + BOX - 1) // BOX * gap
    here = tile % along
    rest = here % gap
    return rest, (size - rest + gap - 1) // gap, here // gap * BOX, tile // along


@triton.jit
def local(n, Y: tl.constexpr, X: tl.constexpr):
    """Coordinates in a box."""
    return n // (Y * X), n // X % Y, n % X


@triton.jit
def steps(
    at, cells, wide, BOX: tl.constexpr, STEP: tl.constexpr, TURNED: tl.constexpr, CUT: tl.constexpr,
    EVEN: tl.constexpr = 1,
):
    """Along one axis, for the box of cells from `at` on: where its first step begins and how many there are, the first
    of which every pair is seen and how many of those. CUT: causality leaves out what is behind (TURNED: before). EVEN:
    what the first cell is a multiple of."""
    end = tl.minimum(at + BOX, cells) - 1
    low, high_first = reach(at, cells, wide, TURNED)
    low_last, high = reach(end, cells, wide, TURNED)
    if CUT:
        if TURNED:
            low = tl.maximum(low, at)
        else:
            high = tl.minimum(high, end)
    low = low // EVEN * EVEN
    whole = (low_last - low + STEP - 1) // STEP
    return low, (high - low + STEP) // STEP, whole, tl.maximum((high_first - low + 1) // STEP - whole, 0)


@triton.jit
def _partly(j, ny, nx, iz, iy, ix, cz, cy, cx, nz, AXES: tl.constexpr):
    """Place of the j-th box that is not whole, where [iz, iz + cz) x [iy, iy + cy) x [ix, ix + cx) are."""
    z = 0
    y = 0
    far = 0
    near = 0
    if AXES == 3:  # sheets without whole boxes, then lines of the other sheets, then what is beside the whole ones
        far = (nz - cz) * ny * nx
        near = far + cz * (ny - cy) * nx
    if AXES == 2:
        near = (ny - cy) * nx
    t = tl.maximum(j - near, 0)
    side = tl.maximum(nx - cx, 1)
    x = t % side
    x = tl.where(x < ix, x, x + cx)
    if AXES > 1:
        y = iy + t // side % tl.maximum(cy, 1)
        z = iz + t // side // tl.maximum(cy, 1)
        t = tl.maximum(j - far, 0)
        lines = tl.maximum(ny - cy, 1)
        line = t // nx % lines
        y = tl.where(j < near, tl.where(line < iy, line, line + cy), y)
        x = tl.where(j < near, t % nx, x)
        z = tl.where(j < near, iz + t // nx // lines, z)
    if AXES == 3:
        sheet = j // (ny * nx)
        z = tl.where(j < far, tl.where(sheet < iz, sheet, sheet + cz), z)
        y = tl.where(j < far, j // nx % ny, y)
        x = tl.where(j < far, j % nx, x)
    else:
        z = 0
    return z, y, x


@triton.jit
def _seen(z, y, x, z0, z1, y0, y1, x0, x1, row, token, TURNED: tl.constexpr, AXES: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether the cells z y x [n] lie in the reach of each row [m]. In order of tokens for CAUSAL."""
    seen = (x[None, :] >= x0[:, None]) & (x[None, :] <= x1[:, None])
    if AXES > 1:
        seen = seen & (y[None, :] >= y0[:, None]) & (y[None, :] <= y1[:, None])
    if AXES > 2:
        seen = seen & (z[None, :] >= z0[:, None]) & (z[None, :] <= z1[:, None])
    if CAUSAL:
        if TURNED:
            seen = seen & (token[None, :] >= row[:, None])
        else:
            seen = seen & (token[None, :] <= row[:, None])
    return seen


@triton.jit
def described(X, cells_z, cells_y, cells_x, size_y, size_x, gap_z, gap_y, gap_x, x_n, D: tl.constexpr,
              SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, BD: tl.constexpr):
    """Descriptor of the cells of one remainder, the first of which is at X: boxes of them, zeros beside."""
    step = tl.full([], 1, tl.int64) * x_n
    return tl.make_tensor_descriptor(
        X, shape=[cells_z, cells_y, cells_x, D], block_shape=[SZ, SY, SX, BD],
        strides=[step * size_x * size_y * gap_z, step * size_x * gap_y, step * gap_x, 1],
    )


@triton.jit
def described_row(X, cells_z, cells_y, cells_x, size_y, size_x, gap_z, gap_y,
                  SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr):
    """The same of one number a cell, where gap_x is 1."""
    step = tl.full([], 1, tl.int64) * size_x
    return tl.make_tensor_descriptor(
        X, shape=[cells_z, cells_y, cells_x], block_shape=[SZ, SY, SX], strides=[step * size_y * gap_z, step * gap_y, 1]
    )


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
    scale,
    cap,
    heads,
    group,
    size_z, size_y, size_x,
    wide_z, wide_y, wide_x,
    gap_z, gap_y, gap_x,
    q_b, q_h, q_n,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    do_b, do_h, do_n,
    out_b, out_h, out_n,
    D: tl.constexpr,
    DVS: tl.constexpr,
    BD: tl.constexpr,  # head sizes, up to powers of two
    BDV: tl.constexpr,
    BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,  # box of queries
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,  # box of keys of a step
    AXES: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A box of queries of one head; the heads of a group are neighbours."""
    BM: tl.constexpr = BZ * BY * BX
    BN: tl.constexpr = SZ * SY * SX
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head = (kv * group + tl.program_id(0) % group).to(tl.int64)
    rest_x, cells_x, at_x, more = own(tl.program_id(0) // group, size_x, gap_x, BX)
    rest_y, cells_y, at_y, more = own(more, size_y, gap_y, BY)
    rest_z, cells_z, at_z, _ = own(more, size_z, gap_z, BZ)
    if (at_x >= cells_x) | (at_y >= cells_y) | (at_z >= cells_z):  # a remainder with fewer cells
        return
    queries = size_z * size_y * size_x
    r = tl.arange(0, BM)
    z, y, x = local(r, BY, BX)
    z += at_z
    y += at_y
    x += at_x
    alive = (z < cells_z) & (y < cells_y) & (x < cells_x)
    row = ((z * gap_z + rest_z) * size_y + y * gap_y + rest_y) * size_x + x * gap_x + rest_x
    z0, z1 = reach(z, cells_z, wide_z, False)
    y0, y1 = reach(y, cells_y, wide_y, False)
    x0, x1 = reach(x, cells_x, wide_x, False)
    low_z, nz, iz, cz = steps(at_z, cells_z, wide_z, BZ, SZ, False, CAUSAL and AXES == 3)
    low_y, ny, iy, cy = steps(at_y, cells_y, wide_y, BY, SY, False, CAUSAL and AXES == 2)
    low_x, nx, ix, cx = steps(at_x, cells_x, wide_x, BX, SX, False, CAUSAL and AXES == 1)
    if CAUSAL:
        cx = cx * 0

    n = tl.arange(0, BN)
    n_z, n_y, n_x = local(n, SY, SX)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    k_mask = (d < D)[:, None]
    SIZES: tl.constexpr = D != BD
    V_SIZES: tl.constexpr = DVS != BDV
    at = row.to(tl.int64)
    q = tl.load(Q + b * q_b + head * q_h + (at * q_n)[:, None] + d[None, :],
                mask=alive[:, None] & (d < D)[None, :], other=0.0)
    apart = (((n_z * gap_z) * size_y + n_y * gap_y) * size_x + n_x * gap_x).to(tl.int64)
    k_at = K + b * k_b + kv.to(tl.int64) * k_h + (apart * k_n)[None, :] + d[:, None]
    V += b * v_b + kv.to(tl.int64) * v_h
    rows = (b * heads + head) * queries + at
    aux_part = tl.num_programs(2).to(tl.int64) * heads * queries
    if BACKWARD:
        v_at = V + (apart * v_n)[None, :] + dv[:, None]
        v_mask = (dv < DVS)[:, None]
        do = tl.load(DO + b * do_b + head * do_h + (at * do_n)[:, None] + dv[None, :],
                     mask=alive[:, None] & (dv < DVS)[None, :], other=0.0)
        if WIDE:
            m = tl.load(AUX + rows, mask=alive, other=0.0)
            rest = tl.load(AUX + aux_part + rows, mask=alive, other=float("inf"))
        else:
            m = tl.load(LSE + rows, mask=alive, other=float("inf"))
            rest = m
        l = tl.load(DELTA + rows, mask=alive, other=0.0)
        acc = tl.zeros([BM, BD], tl.float32)
    else:
        v_at = V + (apart * v_n)[:, None] + dv[None, :]
        v_mask = (dv < DVS)[None, :]
        do = q
        rest = row
        m = tl.full([BM], -float("inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BDV], tl.float32)

    for j in range(cz * cy * cx):
        s_z = low_z + (iz + j // (cy * cx)) * SZ
        s_y = low_y + (iy + j // cx % cy) * SY
        s_x = low_x + (ix + j % cx) * SX
        start = ((s_z * gap_z + rest_z) * size_y + s_y * gap_y + rest_y) * size_x + s_x * gap_x + rest_x
        k = _load(k_at + start.to(tl.int64) * k_n, k_mask, k_mask, False, SIZES)
        v = _load(v_at + start.to(tl.int64) * v_n, v_mask, v_mask, False, V_SIZES)
        m, l, acc = _step(
            q, k, v, do, k_mask, n, k_mask, m, l, acc, rest, OUT, OUT, scale, cap, d, dv, k_n, v_n, D, DVS,
            False, CAPPED, BACKWARD, False, WIDE,
        )
    for j in range(nz * ny * nx - cz * cy * cx):
        p_z, p_y, p_x = _partly(j, ny, nx, iz, iy, ix, cz, cy, cx, nz, AXES)
        s_z = low_z + p_z * SZ
        s_y = low_y + p_y * SY
        s_x = low_x + p_x * SX
        start = ((s_z * gap_z + rest_z) * size_y + s_y * gap_y + rest_y) * size_x + s_x * gap_x + rest_x
        here = (s_z + n_z < cells_z) & (s_y + n_y < cells_y) & (s_x + n_x < cells_x)
        seen = _seen(s_z + n_z, s_y + n_y, s_x + n_x, z0, z1, y0, y1, x0, x1, at, start + apart, False, AXES, CAUSAL)
        if BACKWARD:
            v_here = here[None, :]
        else:
            v_here = here[:, None]
        k = _load(k_at + start.to(tl.int64) * k_n, here[None, :], k_mask, True, SIZES)
        v = _load(v_at + start.to(tl.int64) * v_n, v_here, v_mask, True, V_SIZES)
        m, l, acc = _step(
            q, k, v, do, seen, n, here, m, l, acc, rest, OUT, OUT, scale, cap, d, dv, k_n, v_n, D, DVS,
            True, CAPPED, BACKWARD, False, WIDE,
        )

    place = OUT + b * out_b + head * out_h + (at * out_n)[:, None]
    if BACKWARD:
        mask = alive[:, None] & (d < D)[None, :]
        tl.store(place + d[None, :], (acc * scale).to(OUT.dtype.element_ty), mask=mask)
    else:  # each cell sees itself: l is not 0
        mask = alive[:, None] & (dv < DVS)[None, :]
        tl.store(place + dv[None, :], (acc / l[:, None]).to(OUT.dtype.element_ty), mask=mask)
        log = tl.math.log2(l)
        if WIDE:
            tl.store(AUX + rows, m, mask=alive)
            tl.store(AUX + aux_part + rows, log, mask=alive)
            tl.store(LSE + rows, m + log * LN2, mask=alive)
        else:
            tl.store(LSE + rows, (m + log) * LN2, mask=alive)


@triton.jit
def over_queries(
    Q,
    K,
    V,
    DO,
    LSE,
    AUX,
    DELTA,
    DK,
    DV,
    scale,
    cap,
    heads,
    group,
    size_z, size_y, size_x,
    wide_z, wide_y, wide_x,
    gap_z, gap_y, gap_x,
    q_b, q_h, q_n,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    do_b, do_h, do_n,
    dk_b, dk_h, dk_n,
    dv_b, dv_h, dv_n,
    D: tl.constexpr,
    DVS: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,  # box of keys
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,  # box of queries of a step
    AXES: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    DESCRIBED: tl.constexpr,  # queries come by descriptors of the grid, which take fewer registers
):
    """dK and dV of a box of keys, over all queries of all heads of its group that see any of them."""
    BN: tl.constexpr = BZ * BY * BX
    BM: tl.constexpr = SZ * SY * SX
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    rest_x, cells_x, at_x, more = own(tl.program_id(0), size_x, gap_x, BX)
    rest_y, cells_y, at_y, more = own(more, size_y, gap_y, BY)
    rest_z, cells_z, at_z, _ = own(more, size_z, gap_z, BZ)
    if (at_x >= cells_x) | (at_y >= cells_y) | (at_z >= cells_z):
        return
    queries = size_z * size_y * size_x
    z, y, x = local(tl.arange(0, BN), BY, BX)
    z += at_z
    y += at_y
    x += at_x
    alive = (z < cells_z) & (y < cells_y) & (x < cells_x)
    key = ((z * gap_z + rest_z) * size_y + y * gap_y + rest_y) * size_x + x * gap_x + rest_x
    z0, z1 = reach(z, cells_z, wide_z, True)
    y0, y1 = reach(y, cells_y, wide_y, True)
    x0, x1 = reach(x, cells_x, wide_x, True)
    EVEN: tl.constexpr = 4 if DESCRIBED else 1  # lse and delta come in 16 bytes
    low_z, nz, iz, cz = steps(at_z, cells_z, wide_z, BZ, SZ, True, CAUSAL and AXES == 3)
    low_y, ny, iy, cy = steps(at_y, cells_y, wide_y, BY, SY, True, CAUSAL and AXES == 2)
    low_x, nx, ix, cx = steps(at_x, cells_x, wide_x, BX, SX, True, CAUSAL and AXES == 1, EVEN)
    if CAUSAL:
        cx = cx * 0

    m_z, m_y, m_x = local(tl.arange(0, BM), SY, SX)
    apart = ((m_z * gap_z) * size_y + m_y * gap_y) * size_x + m_x * gap_x
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    far = key.to(tl.int64)[:, None]
    k_mask = alive[:, None] & (d < D)[None, :]
    v_mask = alive[:, None] & (dv < DVS)[None, :]
    k = tl.load(K + b * k_b + kv.to(tl.int64) * k_h + far * k_n + d[None, :], mask=k_mask, other=0.0)
    v = tl.load(V + b * v_b + kv.to(tl.int64) * v_h + far * v_n + dv[None, :], mask=v_mask, other=0.0)
    d_k = tl.zeros([BN, BD], tl.float32)
    d_v = tl.zeros([BN, BDV], tl.float32)
    q_mask = (d[None, :], (d < D)[None, :])
    do_mask = (dv[None, :], (dv < DVS)[None, :])
    D_MASK: tl.constexpr = D != BD
    DV_MASK: tl.constexpr = DVS != BDV
    aux_part = tl.num_programs(2).to(tl.int64) * heads * queries
    first = ((rest_z * size_y + rest_y) * size_x + rest_x).to(tl.int64)
    for i in range(group):
        head = kv * group + i
        row0 = (b * heads + head) * queries
        q_at = Q + b * q_b + head.to(tl.int64) * q_h
        do_at = DO + b * do_b + head.to(tl.int64) * do_h
        lse_at = LSE + row0
        delta_at = DELTA + row0
        if DESCRIBED:
            q_at = described(q_at + first * q_n, cells_z, cells_y, cells_x, size_y, size_x, gap_z, gap_y, gap_x, q_n, D,
                             SZ, SY, SX, BD)
            do_at = described(do_at + first * do_n, cells_z, cells_y, cells_x, size_y, size_x, gap_z, gap_y, gap_x,
                              do_n, DVS, SZ, SY, SX, BDV)
            lse_at = described_row(lse_at + first, cells_z, cells_y, cells_x, size_y, size_x, gap_z, gap_y, SZ, SY, SX)
            delta_at = described_row(
                delta_at + first, cells_z, cells_y, cells_x, size_y, size_x, gap_z, gap_y, SZ, SY, SX
            )
        for j in range(cz * cy * cx):
            s_z = low_z + (iz + j // (cy * cx)) * SZ
            s_y = low_y + (iy + j // cx % cy) * SY
            s_x = low_x + (ix + j % cx) * SX
            start = ((s_z * gap_z + rest_z) * size_y + s_y * gap_y + rest_y) * size_x + s_x * gap_x + rest_x
            if DESCRIBED:
                start = s_x
            d_k, d_v = _turned(
                k, v, q_at, do_at, s_z, s_y, lse_at, AUX + row0, delta_at, aux_part, start, apart, queries, q_n, do_n,
                q_mask, do_mask, d_k, d_v, scale, cap, D_MASK, DV_MASK, k_mask, False, CAPPED, WIDE, DESCRIBED,
            )
        for j in range(nz * ny * nx - cz * cy * cx):
            p_z, p_y, p_x = _partly(j, ny, nx, iz, iy, ix, cz, cy, cx, nz, AXES)
            s_z = low_z + p_z * SZ
            s_y = low_y + p_y * SY
            s_x = low_x + p_x * SX
            start = ((s_z * gap_z + rest_z) * size_y + s_y * gap_y + rest_y) * size_x + s_x * gap_x + rest_x
            seen = _seen(
                s_z + m_z, s_y + m_y, s_x + m_x, z0, z1, y0, y1, x0, x1, key, start + apart, True, AXES, CAUSAL
            )
            if DESCRIBED:
                start = s_x
            d_k, d_v = _turned(  # a row that leaves its line is a row of another, and not seen
                k, v, q_at, do_at, s_z, s_y, lse_at, AUX + row0, delta_at, aux_part, start, apart, queries, q_n, do_n,
                q_mask, do_mask, d_k, d_v, scale, cap, D_MASK, DV_MASK, seen, True, CAPPED, WIDE, DESCRIBED,
            )
    dk_at = DK + b * dk_b + kv.to(tl.int64) * dk_h + far * dk_n + d[None, :]
    dv_at = DV + b * dv_b + kv.to(tl.int64) * dv_h + far * dv_n + dv[None, :]
    tl.store(dk_at, (d_k * scale).to(DK.dtype.element_ty), mask=k_mask)
    tl.store(dv_at, d_v.to(DV.dtype.element_ty), mask=v_mask)
