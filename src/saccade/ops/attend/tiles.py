"""Any selection as tiles: some queries, the keys that they look at together, and what each must not see of those.

A tile costs two matrix products over its keys, so what matters is that few keys are listed that most rows must not see.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saccade.core.selection import (
    Blocks,
    Buckets,
    Gather,
    Lines,
    Pairs,
    PerHead,
    Places,
    Selection,
    Spans,
    Together,
    causal_mask,
)

ROWS = 128  # queries in a tile: its logits then stay in the second-level cache up to about 2,000 keys
SMALL_BLOCK = 16  # lists for fewer queries than this are joined: one masked tile beats many thin products
LOGITS = 1 << 20  # of tiles that are computed together: what a call costs is paid then, and more would leave the cache
TABLE = 1 << 22  # entries of a (query block x key) table that is made at a time


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: queries [start, stop). keys: ascending. hidden: of the last keys, what a row may not see; None: nothing."""

    start: int
    stop: int
    keys: slice | np.ndarray
    size: int
    hidden: Bool[Tensor, "r t"] | None


@dataclass(frozen=True, kw_only=True)
class _Drawn(Selection):
    """Lines, with the first keys of every query block's runs, and with their columns in order: made once."""

    runs: Int[Tensor, "b h nqb t"]
    columns: Int[Tensor, "b h v"]
    q_block: int


@dataclass(frozen=True, kw_only=True)
class Sorted(Selection):
    """Buckets whose queries and keys were brought into the order of their places."""

    places: Places

    def _pairs(self) -> Tensor:
        p, at = self.places, torch.arange(self.keys, device=self.places.low.device)
        seen = (at >= p.low[..., None]) & (at < p.high[..., None])
        if p.hole_low is None or p.hole_high is None:
            return seen
        return seen & ((at < p.hole_low[..., None]) | (at >= p.hole_high[..., None]))


@dataclass(frozen=True)
class Share:
    """Query heads of one key/value head that look at the same keys: row (batch, head) of a selection of one kind."""

    batch: int
    kv_head: int
    members: tuple[int, ...]
    selection: Selection
    row: tuple[int, int]

    def tiles(self, first: int, last: int) -> Iterator[Tile]:
        """Tiles of the queries [first, last); `first` is a multiple of the query block."""
        kind = type(self.selection)
        if kind is Blocks:
            return _of_blocks(self.selection, *self.row, first, last)
        if kind is _Drawn:
            return _of_lines(self.selection, *self.row, first, last)
        if kind is Sorted:
            return _of_places(self.selection.places, *self.row, first, last)
        if kind is Gather and self.selection.q_block >= SMALL_BLOCK:
            return _of_lists(self.selection, *self.row, first, last)
        if kind is Spans and self.selection.causal and self.selection.dilation == 1:
            return _of_spans(self.selection, *self.row, first, last)
        return _of_rows(self.selection, *self.row, first, last)

    @property
    def dense(self) -> bool:
        """True where every (causal) pair is computed."""
        s = self.selection
        if type(s) is not Spans or s.dilation > 1:
            return False
        return int(s.window[_at(s.window, self.row[1])]) >= s.widest

    def rows(self, tile: Tile, heads: int, queries: int, by_token: bool = False) -> list[slice]:
        """The tile's rows in a [b h q], or [b q h], flattened to one axis: those of one query head after the other."""
        start, head, step = self.batch * heads * queries, 1 if by_token else queries, heads if by_token else 1
        first = [start + h * head for h in self.members]
        return [slice(a + tile.start * step, a + (tile.stop - 1) * step + 1, step) for a in first]

    def keys(self, tile: Tile, kv_heads: int, keys: int) -> slice | np.ndarray:
        """The tile's keys in a [b g k] flattened to one axis."""
        first = (self.batch * kv_heads + self.kv_head) * keys
        if isinstance(tile.keys, slice):
            return slice(tile.keys.start + first, tile.keys.stop + first)
        return tile.keys + first

    @property
    def q_block(self) -> int:
        """Queries that share a list."""
        return getattr(self.selection, "q_block", 1)


Batch = list[tuple[Share, Tile]]


def batches(shares: Iterable[Share], first: int, last: int) -> Iterator[Batch]:
    """Tiles of the queries [first, last), those of one shape together, as far as their logits fit into the cache."""
    waiting: dict[tuple[int, ...], Batch] = {}
    for share in shares:
        for tile in share.tiles(first, last):
            rows = len(share.members) * (tile.stop - tile.start)
            shape = (len(share.members), rows, tile.size, 0 if tile.hidden is None else tile.hidden.shape[1])
            alike = waiting.setdefault(shape, [])
            alike.append((share, tile))
            if (len(alike) + 1) * rows * tile.size > LOGITS:
                yield waiting.pop(shape)
    yield from waiting.values()


def axes(selection: Selection) -> tuple[int, int]:
    """Sizes of the selection's batch and head axes; 1 stands for all."""
    match selection:
        case Blocks():
            return selection.crow.shape[0], selection.crow.shape[1]
        case Gather():
            return selection.index.shape[0], selection.index.shape[1]
        case Lines():
            return selection.slashes.shape[0], selection.slashes.shape[1]
        case _Drawn():
            return selection.runs.shape[0], selection.runs.shape[1]
        case Pairs():
            return selection.allowed.shape[0], selection.allowed.shape[1]
        case Buckets():
            both = selection.q_bucket.shape, selection.k_bucket.shape
            return max(s[0] for s in both), max(s[1] for s in both)
        case Sorted():
            return selection.places.low.shape[0], selection.places.low.shape[1]
        case Spans():
            return 1, max(len(selection.sinks), len(selection.window))
        case PerHead():
            return max(axes(s)[0] for _, s in selection.parts), sum(len(h) for h, _ in selection.parts)
        case Together():
            every = [axes(s) for s in selection.parts]
            return max(b for b, _ in every), max(h for _, h in every)
    raise AssertionError(f"a new kind of selection: {selection.kind}")


def shares(selection: Selection, batch: int, heads: int, kv_heads: int) -> list[Share]:
    """Who computes what: for every sequence and key/value head, its query heads by what they look at."""
    rows = _head_rows(_lower(selection), heads)
    group = heads // kv_heads
    out: list[Share] = []
    known: dict[tuple[int, int, int], list[bool]] = {}

    def same(part: Selection, b: int, one: int, other: int) -> bool:
        pair = id(part), one, other
        if pair not in known:
            known[pair] = _same(part, one, other)
        return known[pair][b if len(known[pair]) > 1 else 0]

    for b in range(batch):
        for g in range(kv_heads):
            alike: dict[tuple[int, int], list[int]] = {}
            for h in range(g * group, (g + 1) * group):
                part, row = rows[h]
                twins = (first for first in alike if first[0] == id(part) and same(part, b, first[1], row))
                alike.setdefault(next(twins, (id(part), row)), []).append(h)
            for members in alike.values():
                part, row = rows[members[0]]
                out.append(Share(b, g, tuple(members), part, (b if axes(part)[0] > 1 else 0, row)))
    return out


def _same(selection: Selection, one: int, other: int) -> list[bool]:
    """Whether two heads have the same lists, by sequence: heads of a group often do, and are then one product. All are
    compared at once, since a GPU is waited for."""
    match selection:
        case Blocks():
            lists = [selection.crow, selection.col]
        case Gather():
            lists = [x for x in (selection.index, selection.ranges) if x is not None]
        case _:
            return [one == other]
    if one == other:
        return [True]
    return torch.stack([(x[:, one] == x[:, other]).flatten(1).all(1) for x in lists]).all(0).tolist()


def _head_rows(selection: Selection, heads: int) -> list[tuple[Selection, int]]:
    """For each query head the selection of one kind that holds it, and its row there."""
    if not isinstance(selection, PerHead):
        many = axes(selection)[1] > 1
        return [(selection, h if many else 0) for h in range(heads)]
    out: dict[int, tuple[Selection, int]] = {}
    for members, part in selection.parts:
        inner = _head_rows(part, len(members))
        out.update(zip(members.tolist(), inner))
    return [out[h] for h in range(heads)]


def _lower(selection: Selection) -> Selection:
    """Kinds that are computed as another kind."""
    if isinstance(selection, Lines):
        return _Drawn(
            runs=selection.tiles(),
            columns=selection.verticals.sort(-1).values,
            q_block=selection.block,
            queries=selection.queries,
            keys=selection.keys,
            causal=selection.causal,
        )
    if isinstance(selection, Spans) and selection.grid:
        return Pairs(
            allowed=selection.mask(), queries=selection.queries, keys=selection.keys, causal=selection.causal
        )
    if isinstance(selection, PerHead):
        parts = tuple((heads, _lower(part)) for heads, part in selection.parts)
        return PerHead(parts=parts, queries=selection.queries, keys=selection.keys, causal=selection.causal)
    return selection


def _at(x: Tensor, i: int) -> int:
    return i if len(x) > 1 else 0


def _tile(s: Selection, start: int, stop: int, keys: np.ndarray) -> Tile:
    """A tile whose rows all look at `keys`, as far as causality lets them."""
    if not s.causal:
        return Tile(start, stop, _run(keys), len(keys), None)
    first = start + s.offset
    seen, end = keys.searchsorted((first + 1, stop + s.offset)).tolist()
    hidden = _later(keys[seen:end], first, stop - start) if end > seen else None
    return Tile(start, stop, _run(keys[:end]), end, hidden)


def _later(keys: np.ndarray, first: int, rows: int) -> Bool[Tensor, "r t"]:
    """keys > position of each row; all lie behind the first row, so that a run of them is a piece of a triangle."""
    run = _run(keys)
    if isinstance(run, slice):
        return _triangle(rows, run.start - first, run.stop - first)
    return torch.from_numpy(run > np.arange(first, first + rows, dtype=np.int32)[:, None])


@functools.lru_cache(maxsize=256)
def _triangle(rows: int, start: int, stop: int) -> Bool[Tensor, "r t"]:
    """Column > row, of the columns [start, stop). The same object every time, so that tiles share it."""
    return torch.arange(start, stop) > torch.arange(rows)[:, None]


def _run(keys: np.ndarray) -> slice | np.ndarray:
    """A slice if the keys follow on one another: it need not be copied."""
    if not len(keys):
        return slice(0, 0)
    a, b = int(keys[0]), int(keys[-1])
    return slice(a, b + 1) if b - a + 1 == len(keys) else keys


def _pieces(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, ROWS):
        yield start, min(start + ROWS, last)


def _of_blocks(s: Blocks, b: int, h: int, first: int, last: int) -> Iterator[Tile]:
    i0, i1 = first // s.q_block, -(-last // s.q_block)
    pointer = s.crow[b, h, i0 : i1 + 1].cpu().numpy()
    col = s.col[b, h, pointer[0] : pointer[-1]].cpu().numpy()
    keys = (col[:, None] * s.k_block + np.arange(s.k_block, dtype=np.int32)).ravel()
    edges = ((pointer - pointer[0]) * s.k_block).tolist()
    for i, (a, z) in enumerate(pairwise(edges), i0):
        mine = keys[a:z]
        if z > a and mine[-1] >= s.keys:  # the last key block is cut short
            mine = mine[: s.keys - 1 - int(mine[-1])]
        for start, stop in _pieces(i * s.q_block, min((i + 1) * s.q_block, last)):
            yield _tile(s, start, stop, mine)


def _table(s: Gather, b: int, h: int, i0: int, i1: int) -> Bool[Tensor, "nqb k"]:
    """Which keys the query blocks [i0, i1) list."""
    index = s.index[b, h, i0:i1].cpu()
    keep = torch.zeros(i1 - i0, s.keys + 1, dtype=torch.bool)
    keep.scatter_(-1, torch.where(index >= 0, index, s.keys).long(), True)
    keep = keep[:, : s.keys]
    if s.ranges is not None:
        for row, ranges in zip(keep, s.ranges[b, h, i0:i1].clamp(0, s.keys).tolist()):
            for a, z in ranges:
                row[a:z] = True
    return keep


def _of_lists(s: Gather, b: int, h: int, first: int, last: int) -> Iterator[Tile]:
    step = max(1, TABLE // max(1, s.keys))
    for i0 in range(first // s.q_block, -(-last // s.q_block), step):
        i1 = min(i0 + step, -(-last // s.q_block))
        table = _table(s, b, h, i0, i1)
        keys = table.nonzero()[:, 1].int().numpy()
        for i, mine in enumerate(np.split(keys, table.sum(-1).cumsum(0)[:-1].numpy()), i0):
            for start, stop in _pieces(i * s.q_block, min((i + 1) * s.q_block, last)):
                yield _tile(s, start, stop, mine)


def _of_lines(s: _Drawn, b: int, h: int, first: int, last: int) -> Iterator[Tile]:
    """As `Lines.gather` says it: whole runs, and between them the columns that lie in none."""
    every = np.arange(s.keys, dtype=np.int32)
    columns = s.columns[b, h].cpu().numpy().astype(np.int32)
    columns = columns[columns >= 0]
    i0, i1 = first // s.q_block, -(-last // s.q_block)
    for i, starts in enumerate(s.runs[b, h, i0:i1].cpu().numpy(), i0):
        starts = starts[starts >= 0]
        stops = np.minimum(starts + s.q_block, s.keys)
        mine = columns[: columns.searchsorted((i + 1) * s.q_block + s.offset)] if s.causal else columns
        before, after = mine.searchsorted((starts, stops)).tolist()
        pieces = [x for a, z, *run in zip([0, *after], before, starts, stops) for x in (mine[a:z], every[slice(*run)])]
        keys = np.concatenate([*pieces, mine[after[-1] if after else 0 :]])
        for start, stop in _pieces(i * s.q_block, min((i + 1) * s.q_block, last)):
            yield _tile(s, start, stop, keys)


def _of_spans(s: Spans, b: int, h: int, first: int, last: int) -> Iterator[Tile]:
    sinks, window = int(s.sinks[_at(s.sinks, h)]), int(s.window[_at(s.window, h)])
    for start, stop in _pieces(first, last):
        p, end = start + s.offset, stop + s.offset
        near = max(p - window + 1, 0)
        sunk = np.arange(min(sinks, near))
        keys = np.concatenate([sunk, np.arange(near, end)]).astype(np.int32)
        if end <= window:
            yield _tile(s, start, stop, keys)
        else:
            hidden = _band(stop - start, end - near, max(0, sinks - near), window)
            yield Tile(start, stop, _run(keys), len(keys), hidden if end > near else None)


@functools.lru_cache(maxsize=64)
def _band(rows: int, keys: int, sunk: int, window: int) -> Bool[Tensor, "r k"]:
    """What rows may not see of a run of keys that ends with the last row's own, whose first `sunk` are sinks: what is
    ahead of them or left their window. The same object every time, so that tiles share it."""
    behind = torch.arange(rows)[:, None] - torch.arange(rows - keys, rows)
    return (behind < 0) | (behind >= window) & (torch.arange(keys) >= sunk)


def _of_places(p: Places, b: int, h: int, first: int, last: int) -> Iterator[Tile]:
    """Tiles of queries in order: the keys from the first that one of them sees to the last."""
    edges = (None if x is None else x[b, h].cpu().numpy()[:, None] for x in (p.low, p.high, p.hole_low, p.hole_high))
    low, high, *hole = edges
    for start, stop in _pieces(first, last):
        a, z = low[start:stop], high[start:stop]
        some = a < z
        if not some.any():
            yield Tile(start, stop, slice(0, 0), 0, None)
            continue
        begin, end = int(a[some].min()), int(z[some].max())
        place = np.arange(begin, end, dtype=np.int32)
        hidden = (place < a) | (place >= z)
        if hole[0] is not None:
            hidden |= (place >= hole[0][start:stop]) & (place < hole[1][start:stop])
        yield Tile(start, stop, slice(begin, end), end - begin, torch.from_numpy(hidden) if hidden.any() else None)


def _row_mask(s: Selection, b: int, h: int, start: int, stop: int) -> Bool[Tensor, "r k"]:
    """Which keys each of the queries [start, stop) looks at, causality apart."""
    match s:
        case Gather():
            i0, i1 = start // s.q_block, -(-stop // s.q_block)
            wide = _table(s, b, h, i0, i1).repeat_interleave(s.q_block, 0)
            return wide[start - i0 * s.q_block :][: stop - start]
        case Pairs():
            return s.allowed[b, h, start:stop].cpu()
        case Buckets():
            q, k = (x[_at(x, b), _at(x[0], h)].cpu() for x in (s.q_bucket, s.k_bucket))
            rows = dataclasses.replace(s, q_bucket=q[None, None, start:stop], k_bucket=k[None, None])
            return rows._pairs()[0, 0]
        case Spans():
            behind = torch.arange(start + s.offset, stop + s.offset)[:, None] - torch.arange(s.keys)
            near = (behind.abs() < int(s.window[_at(s.window, h)])) & (behind % s.dilation == 0)
            near[:, : int(s.sinks[_at(s.sinks, h)])] = True
            return near
    raise AssertionError(f"no rows of {s.kind}")


def _of_rows(s: Selection, b: int, h: int, first: int, last: int) -> Iterator[Tile]:
    """Tiles whose rows look at different keys: those that any of them wants, the others hidden row by row."""
    for start, stop in _pieces(first, last):
        end = stop + s.offset if s.causal else s.keys
        mask = _row_mask(s, b, h, start, stop)[:, :end]
        if s.causal:
            mask = mask & causal_mask(stop - start, end)
        keys = mask.any(0).nonzero()[:, 0].int()
        hidden = ~(mask if len(keys) == end else mask.index_select(1, keys))
        yield Tile(start, stop, _run(keys.numpy()), len(keys), hidden if len(keys) else None)
