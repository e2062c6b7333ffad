"""Rows read by Triton where they lie: of pinned host memory only what is asked for goes over the bus."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

NUMBERS = 4096  # of a program


@triton.jit(do_not_specialize=["rows", "each"])
def _fetch(X, PLACE, OUT, x_g, x_n, x_d, rows, each, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """Some of all rows; `each` of them for a head."""
    row, d = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BD)
    place = tl.load(PLACE + row, mask=row < rows, other=-1).to(tl.int64)
    at = (row // each) * x_g + place * x_n
    x = tl.load(X + at[:, None] + d[None, :] * x_d, mask=(place >= 0)[:, None] & (d < D)[None, :], other=0.0)
    tl.store(OUT + row[:, None] * D + d[None, :], x, mask=(row < rows)[:, None] & (d < D)[None, :])


def fetch(x: Float[Tensor, "g n d"], place: Int[Tensor, "g r l"]) -> Float[Tensor, "g r l d"]:
    """See the op's api."""
    d, rows = x.shape[2], place.numel()
    out = torch.empty(*place.shape, d, dtype=x.dtype, device=place.device)
    if rows:
        wide = triton.next_power_of_2(d)
        high = max(1, NUMBERS // wide)
        _fetch[(triton.cdiv(rows, high),)](
            x, place.contiguous(), out, *x.stride(), rows, rows // len(place), D=d, BD=wide, BM=high
        )
    return out
