"""Lines as lists, made on the device: the runs of every query block, and a bit for every column that lies in none.

What `Lines.tiles()` and `Lines.gather()` say, without a table of columns for every query block. `farther[o]` is the
largest distance in the list below o; a query block walks from run to run by it, a lane for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from saccade.core.selection import Lines
from saccade.ops.attend.triton.lists import steps

LANES = 64
CHUNK = 128  # columns that are looked up together
WORD = 32
FEW_RUNS = 1 << 24  # a table for so many is made without asking how many there are: 64 MiB


@triton.jit
def _walk(FARTHER, COUNT, RUNS, keys, offset, blocks, last, most, WIDTH: tl.constexpr, LANES: tl.constexpr,
          WRITE: tl.constexpr):
    """How many runs each query block has, and where they begin."""
    line = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * LANES + tl.arange(0, LANES)
    alive = block < blocks
    end = (block + 1) * WIDTH + offset
    farther = FARTHER + line * (last + 1)
    stop = tl.zeros([LANES], tl.int32)
    count = tl.zeros([LANES], tl.int32)
    going = tl.max(alive.to(tl.int32))
    while going > 0:
        reach = tl.where(stop < WIDTH, end, end - stop)
        reach = tl.minimum(tl.maximum(reach, 0), last)
        o = tl.load(farther + reach, mask=alive, other=-1)
        e = tl.maximum(end - o, WIDTH)
        live = alive & (o >= 0) & (e > stop) & (stop < keys)
        start = tl.where((e > stop + WIDTH) | (stop == 0), e - WIDTH, stop)
        some = live & (start < keys)
        if WRITE:
            tl.store(RUNS + (line * blocks + block) * most + count, start, mask=some)
        count += some.to(tl.int32)
        stop = tl.where(live, start + WIDTH, keys)
        alive = live
        going = tl.max(live.to(tl.int32))
    tl.store(COUNT + line * blocks + block, count, mask=block < blocks)


@triton.jit
def _mark(COLUMNS, COUNT, RUNS, BITS, columns, columns_h, keys, offset, blocks, most, words, WIDTH: tl.constexpr,
          CAUSAL: tl.constexpr, CHUNK: tl.constexpr, WORD: tl.constexpr):
    """A bit for each column that is in no run of a query block, and not behind it."""
    block = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, CHUNK)
    many = tl.load(COUNT + line * blocks + block)
    runs = RUNS + (line * blocks + block) * most
    start = tl.load(runs, mask=many > 0, other=keys)
    limit = keys
    if CAUSAL:
        limit = tl.minimum((block + 1) * WIDTH + offset, keys)
    for j in range(0, columns, CHUNK):
        key = tl.load(COLUMNS + line * columns_h + j + n, mask=j + n < columns, other=-1)
        low = tl.zeros([CHUNK], tl.int32)  # the number of runs that begin by the key lies in [low, high]
        high = low + many
        near = (key >= start) & (key < limit)  # most columns are before the first run, or behind the block
        step = tl.where(tl.max(near.to(tl.int32)) > 0, many, 0)
        while step > 0:
            middle = (low + high + 1) // 2
            first = tl.load(runs + middle - 1, mask=middle > 0, other=0)
            before = (first <= key) | (middle == 0)
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
            step = step // 2
        first = tl.load(runs + low - 1, mask=low > 0, other=0)
        inside = (low > 0) & (key < first + WIDTH)
        use = ((key >= 0) & (key < limit) & (inside == 0)).to(tl.int32)
        bits = tl.sum(tl.reshape(use, [CHUNK // WORD, WORD]) << tl.arange(0, WORD)[None, :], 1)
        word = j // WORD + tl.arange(0, CHUNK // WORD)
        tl.store(BITS + (line * blocks + block) * words + word, bits, mask=word < words)


def runs(
    s: Lines, device: torch.device, tight: bool = True
) -> tuple[Int[Tensor, "b h nqb"], Int[Tensor, "b h nqb t"]]:
    """How many runs of `block` keys each query block's diagonals make, and their first keys, ascending.

    tight: t is the largest count, for which the host waits; else it may be more, where the table is small.
    """
    slashes = s.slashes.to(device, torch.int32)
    b, h = torch.broadcast_shapes(slashes.shape[:2], s.verticals.shape[:2])
    blocks = -(-s.queries // s.block)
    last = blocks * s.block + s.offset
    farther = _farther(slashes, last).expand(b, h, -1).contiguous()
    count = torch.empty(b, h, blocks, dtype=torch.int32, device=device)
    shape = (s.keys, s.offset, blocks, last)
    grid = (triton.cdiv(blocks, LANES), b * h)
    if not count.numel():
        return count, count.new_empty(b, h, blocks, 1)
    most = max(1, min(slashes.shape[-1], -(-s.keys // s.block)))  # runs lie apart, one for each diagonal at most
    if tight or count.numel() * most > FEW_RUNS:
        _walk[grid](farther, count, count, *shape, 0, WIDTH=s.block, LANES=LANES, WRITE=False)
        most = max(1, int(count.max()))  # the host waits here
    first = torch.empty(b, h, blocks, most, dtype=torch.int32, device=device)
    _walk[grid](farther, count, first, *shape, most, WIDTH=s.block, LANES=LANES, WRITE=True)
    return count, first


def drawn(
    s: Lines, device: torch.device
) -> tuple[Int[Tensor, "b h nqb"], Int[Tensor, "b h nqb t"], Int[Tensor, "b h 1 v"], Int[Tensor, "b h nqb w"]]:
    """The runs of each query block, the columns in order, and which of those count."""
    count, first = runs(s, device, tight=False)
    b, h, blocks = count.shape
    columns = s.verticals.to(device, torch.int32).sort(-1).values.expand(b, h, -1).contiguous()
    words = -(-columns.shape[-1] // WORD)
    bits = torch.empty(b, h, blocks, words, dtype=torch.int32, device=device)
    if count.numel():
        _mark[(blocks, b * h)](
            columns, count, first, bits, columns.shape[-1], columns.shape[-1], s.keys, s.offset, blocks,
            first.shape[-1], words, WIDTH=s.block, CAUSAL=s.causal, CHUNK=CHUNK, WORD=WORD,
        )
    return count, first, columns[:, :, None], bits


def _farther(slashes: Int[Tensor, "b h s"], last: int) -> Int[Tensor, "b h n"]:
    """[o]: the largest distance in the list that is below o, or -1; for o from 0 to `last`."""
    ordered = torch.nn.functional.pad(slashes.sort(-1).values, (1, 0), value=-1)
    each = steps(last + 1, slashes.device).int().expand(*slashes.shape[:2], -1).contiguous()
    return ordered.gather(-1, torch.searchsorted(ordered[..., 1:].contiguous(), each))
