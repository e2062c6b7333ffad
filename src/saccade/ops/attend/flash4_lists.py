"""The lists of queries for flash-attn-4 from those of a selection of blocks, in one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.selection import Blocks
from saccade.ops.attend.flash4 import BLOCK, Lists

CHUNK = 128  # entries of a row at a time


def split(s: Blocks, rows: int, device: torch.device) -> Lists:
    """Of each block of `rows` queries: the key blocks that are cut by the diagonal, and those that are whole.

    What lies behind the counts is not written.
    """
    crow, col = (x.to(device, torch.int32).contiguous() for x in (s.crow, s.col))
    b, h, _ = col.shape
    nqb, nkb = -(-s.queries // rows), -(-s.keys // BLOCK)

    def empty(*size: int) -> Tensor:
        return torch.empty(b, h, nqb, *size, dtype=torch.int32, device=device)

    lists = Lists(empty(), empty(min(nkb, rows // BLOCK + 1)), empty(), empty(nkb))
    shape = s.queries, s.keys, nqb, nkb, crow.shape[-1], col.shape[-1], lists.block.shape[-1]
    units = {"TALL": s.q_block // rows, "WIDE": s.k_block // BLOCK, "ROWS": rows, "BLOCK": BLOCK, "CHUNK": CHUNK}
    _split[nqb, b * h](crow, col, *lists, *shape, CAUSAL=s.causal, **units)
    return lists


@triton.jit
def _split(
    crow, col, count, block, whole_count, whole_block, queries, keys, nqb, nkb, n_crow, n_col, most,
    CAUSAL: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A row of blocks: its entries ascend, so that the whole ones come first, and then those that are cut."""
    i, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(crow + head * n_crow + i // TALL)
    n = (tl.load(crow + head * n_crow + i // TALL + 1) - first) * WIDE
    whole_end, seen_end = nkb, nkb  # numbers of key blocks
    if CAUSAL:
        q0 = i * ROWS + keys - queries
        q1 = tl.minimum(i * ROWS + ROWS, queries) + keys - queries
        whole_end = tl.where(q0 + 1 >= keys, nkb, tl.maximum(q0 + 1, 0) // BLOCK)
        seen_end = tl.minimum((tl.maximum(q1, 0) + BLOCK - 1) // BLOCK, nkb)
    row = head * nqb + i
    wholes, cuts = 0, 0
    for start in range(0, n, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        number = tl.load(col + head * n_col + first + entry // WIDE, mask=entry < n, other=nkb) * WIDE + entry % WIDE
        whole = (entry < n) & (number < whole_end)
        cut = (entry < n) & (number >= whole_end) & (number < seen_end)
        wholes += tl.sum(whole.to(tl.int32))  # complete where the first cut one comes
        cuts += tl.sum(cut.to(tl.int32))
        tl.store(whole_block + row * nkb + entry, number, mask=whole)
        tl.store(block + row * most + entry - wholes, number, mask=cut)
    tl.store(count + row, cuts)
    tl.store(whole_count + row, wholes)
