"""Where to look: which (query, key) pairs are computed. Every sparse method says it in one of these kinds.

Rows: `queries` queries ask, the last of `keys` keys, so query i has key index `offset + i`. Query blocks are
counted from the first query, key blocks from the first key. A size of 1 in the batch or head axis stands for all.
Index tensors are int32, -1 where there is nothing. With `causal`, no query sees a key behind it, whatever the lists
say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.shard import Shard


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Base: `mask()` is the meaning, everything else is derived or faster."""

    queries: int
    keys: int
    causal: bool = True

    @property
    def offset(self) -> int:
        """Key index of the first query."""
        return self.keys - self.queries

    @property
    def kind(self) -> str:
        """The kind's name in lower case: "blocks", "lines"."""
        return type(self).__name__.lower()

    def mask(self) -> Bool[Tensor, "b h q k"]:
        """True where a pair is computed."""
        allowed = self._pairs()
        if not self.causal or self.queries == 1:  # a single query is behind all keys
            return allowed
        return allowed & causal_mask(self.queries, self.keys, allowed.device)

    def _pairs(self) -> Bool[Tensor, "b h q k"]:
        raise NotImplementedError

    def density(self) -> Float[Tensor, "b h"]:
        """Pairs computed over the pairs of a dense (causal) pass, per row and head."""
        return self.count() / self.dense_pairs

    def count(self) -> Float[Tensor, "b h"]:
        """Pairs computed, per row and head, in float64."""
        return self.mask().double().sum((-2, -1))

    @property
    def dense_pairs(self) -> int:
        """Pairs of a dense pass of this shape."""
        q, k = self.queries, self.keys
        return max(1, q * k - q * (q - 1) // 2 if self.causal else q * k)

    def __and__(self, other: Selection) -> Pairs:
        return self._joined(other, torch.logical_and)

    def __or__(self, other: Selection) -> Pairs:
        return self._joined(other, torch.logical_or)

    def _joined(self, other: Selection, join: Callable[[Tensor, Tensor], Tensor]) -> Pairs:
        assert (self.queries, self.keys) == (other.queries, other.keys), "selections of different shapes"
        allowed = join(self.mask(), other.mask())
        return Pairs(allowed=allowed, queries=self.queries, keys=self.keys, causal=self.causal and other.causal)


def column(numbers: Sequence[int], device: torch.device) -> Int[Tensor, "q 1"]:
    """On the device; a single number is not copied there, which would make it wait."""
    if len(numbers) == 1:
        return torch.full((1, 1), numbers[0], device=device)
    return torch.tensor(numbers, device=device)[:, None]


def causal_mask(queries: int, keys: int, device: torch.device | str = "cpu") -> Bool[Tensor, "q k"]:
    """True where key <= query, the last query at the last key."""
    position = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) <= position[:, None]


def _ramp(steps: Tensor, width: Tensor | int) -> Tensor:
    """sum_{t=1..steps} min(t, width): pairs of a causal staircase `steps` rows high over a range `width` keys wide."""
    steps = steps.clamp(min=0).double()
    inside = torch.minimum(steps, torch.as_tensor(width, device=steps.device).double())
    return inside * (inside + 1) / 2 + (steps - inside) * width


def _count_ranges(start: Tensor, end: Tensor, row0: Tensor, row1: Tensor, causal: bool) -> Tensor:
    """Pairs of rows [row0, row1) (as key indices) with keys [start, end), element by element; empty ranges count 0."""
    width = (end - start).clamp(min=0)
    if not causal:
        return width.double() * (row1 - row0)
    return _ramp(row1 - start, width) - _ramp(row0 - start, width)


@dataclass(frozen=True, kw_only=True)
class Pairs(Selection):
    """Any set of pairs, spelt out. For small shapes and for combinations of other kinds."""

    allowed: Bool[Tensor, "b h q k"]

    def _pairs(self) -> Tensor:
        return self.allowed


@dataclass(frozen=True, kw_only=True)
class Blocks(Selection):
    """Whole key blocks for whole query blocks, as compressed rows.

    Query block i looks at the key blocks `col[..., crow[..., i] : crow[..., i + 1]]`, ascending, each once.
    """

    crow: Int[Tensor, "b h nqb+1"]
    col: Int[Tensor, "b h nnz"]
    q_block: int
    k_block: int

    @classmethod
    def of(
        cls,
        keep: Bool[Tensor, "b h nqb nkb"],
        *,
        queries: int,
        keys: int,
        q_block: int,
        k_block: int,
        causal: bool = True,
    ) -> Blocks:
        """From a table of which key block each query block keeps."""
        count = keep.sum(-1)
        crow = torch.nn.functional.pad(count.cumsum(-1), (1, 0)).int()
        longest = int(crow[..., -1].max()) if crow.numel() else 0
        col = torch.full((*keep.shape[:2], longest), -1, dtype=torch.int32, device=keep.device)
        b, h, _, j = keep.nonzero(as_tuple=True)
        # rank of each kept block inside its own (b, h): nonzero runs in row-major order
        first = torch.nn.functional.pad(crow[..., -1].flatten().cumsum(0), (1, 0))[b * keep.shape[1] + h]
        col[b, h, torch.arange(len(b), device=keep.device) - first] = j.int()
        return cls(crow=crow, col=col, q_block=q_block, k_block=k_block, queries=queries, keys=keys, causal=causal)

    def part(self, shard: Shard) -> Blocks:
        """Of a selection for all heads of a layer, that for the heads of one process."""
        return replace(self, crow=shard.mine(self.crow, 1), col=shard.mine(self.col, 1))

    @property
    def grid(self) -> tuple[int, int]:
        """Query blocks, key blocks."""
        return -(-self.queries // self.q_block), -(-self.keys // self.k_block)

    def table(self) -> Bool[Tensor, "b h nqb nkb"]:
        """Which key block each query block keeps."""
        nqb, nkb = self.grid
        b, h, nnz = self.col.shape
        entry = torch.arange(nnz, device=self.col.device).expand(b, h, nnz).contiguous()
        row = torch.searchsorted(self.crow[..., 1:].long().contiguous(), entry, right=True)
        keep = torch.zeros(b, h, nqb + 1, nkb + 1, dtype=torch.bool, device=self.col.device)
        bi, hi = torch.meshgrid(torch.arange(b), torch.arange(h), indexing="ij")
        keep[bi[..., None], hi[..., None], row, torch.where(self.col >= 0, self.col, nkb).long()] = True
        return keep[..., :nqb, :nkb]

    def _pairs(self) -> Tensor:
        keep = self.table().repeat_interleave(self.q_block, 2).repeat_interleave(self.k_block, 3)
        return keep[..., : self.queries, : self.keys]

    def count(self) -> Tensor:
        (nqb, nkb), keep = self.grid, self.table()
        at = keep.device
        row0 = torch.arange(nqb, device=at) * self.q_block
        row1 = (row0 + self.q_block).clamp(max=self.queries) + self.offset
        start = torch.arange(nkb, device=at) * self.k_block
        end = (start + self.k_block).clamp(max=self.keys)
        pairs = _count_ranges(start[None], end[None], row0[:, None] + self.offset, row1[:, None], self.causal)
        return (keep * pairs).sum((-2, -1))


@dataclass(frozen=True, kw_only=True)
class Gather(Selection):
    """A list of keys for each query block, and ranges of keys; disjoint by construction.

    `index`: key indices, -1 for none. `ranges`: [start, end) pairs, empty where start >= end. `shared`: so many query
    heads in a row have one list, which each is given; what reads it may then read its keys once.
    """

    index: Int[Tensor, "b h nqb l"]
    ranges: Int[Tensor, "b h nqb r 2"] | None = None
    q_block: int = 1
    shared: int = 1

    def _rows(self) -> tuple[Tensor, Tensor]:
        row0 = torch.arange(self.index.shape[2], device=self.index.device) * self.q_block
        return row0 + self.offset, (row0 + self.q_block).clamp(max=self.queries) + self.offset

    def _pairs(self) -> Tensor:
        b, h, nqb, _ = self.index.shape
        keep = torch.zeros(b, h, nqb, self.keys + 1, dtype=torch.bool, device=self.index.device)
        keep.scatter_(-1, torch.where(self.index >= 0, self.index, self.keys).long(), True)
        keep = keep[..., : self.keys]
        if self.ranges is not None:
            edge = torch.zeros(b, h, nqb, self.keys + 1, dtype=torch.int32, device=keep.device)
            start, end = self.ranges.clamp(0, self.keys).long().unbind(-1)
            some = (end > start).int()
            edge.scatter_add_(-1, start, some).scatter_add_(-1, end, -some)
            keep = keep | (edge.cumsum(-1)[..., : self.keys] > 0)
        return keep.repeat_interleave(self.q_block, 2)[:, :, : self.queries]

    def count(self) -> Tensor:
        if self.queries == 1:  # no key is behind it; decoding counts in every layer
            listed = (self.index >= 0).sum((-2, -1))
            if self.ranges is not None:
                start, end = self.ranges.clamp(0, self.keys).unbind(-1)
                listed = listed + (end - start).clamp(min=0).sum((-2, -1))
            return listed.double()
        row0, row1 = (r[:, None] for r in self._rows())
        one = _count_ranges(self.index, self.index + 1, row0, row1, self.causal)
        pairs = torch.where(self.index >= 0, one, 0.0).sum((-2, -1))
        if self.ranges is not None:
            start, end = self.ranges.clamp(0, self.keys).unbind(-1)
            some = _count_ranges(start, end, row0, row1, self.causal)
            pairs = pairs + torch.where(end > start, some, 0.0).sum((-2, -1))
        return pairs


@dataclass(frozen=True, kw_only=True)
class Spans(Selection):
    """Fixed shapes. In one dimension: the first `sinks` keys, and the keys less than `window` behind the query (every
    `dilation`-th of them). On a grid: the `kernel` neighbourhood of each cell, shifted inwards at the border so that
    every query has the same number of neighbours.

    `sinks` and `window` are one number per query head; `window >= keys` is dense.
    """

    sinks: Int[Tensor, " h"]
    window: Int[Tensor, " h"]
    dilation: int = 1
    grid: tuple[int, ...] | None = None
    kernel: tuple[int, ...] | None = None

    @property
    def dense(self) -> bool:
        """Whether it is known, without asking a device, that every pair is in it."""
        plain = not self.grid and self.dilation == 1 and self.window.device.type == "cpu"
        return plain and min(self.window.tolist()) >= self.widest

    @property
    def widest(self) -> int:
        """A window of so many keys sees all: where it is not causal a query may lie before all keys, if there are more.
        """
        return max(self.queries, self.keys)

    def _pairs(self) -> Tensor:
        return self._neighbours() if self.grid else self._line()

    def _line(self) -> Tensor:
        at = self.sinks.device
        q = torch.arange(self.offset, self.keys, device=at)[:, None]
        k = torch.arange(self.keys, device=at)
        behind = q - k if self.causal else (q - k).abs()
        near = (behind < self.window[:, None, None]) & (behind % self.dilation == 0)
        return (near | (k < self.sinks[:, None, None]))[None]

    def _neighbours(self) -> Tensor:
        assert self.grid is not None and self.kernel is not None
        assert self.queries == self.keys == torch.Size(self.grid).numel(), "a grid asks about all of its cells"
        near = torch.ones(1, 1, dtype=torch.bool, device=self.sinks.device)
        for size, width in zip(self.grid, self.kernel):
            axis = self._along(size, width)
            near = (near[:, None, :, None] & axis[None, :, None]).flatten(2).flatten(0, 1)
        return near[None, None]

    def _along(self, size: int, width: int) -> Bool[Tensor, "n n"]:
        """Who is near whom along one axis."""
        c, span = torch.arange(size, device=self.sinks.device), (width - 1) * self.dilation
        first = (c - (width // 2) * self.dilation).clamp(min=0)
        # shift inwards in steps of the dilation, so that a query stays among its own neighbours
        over = (first + span - (size - 1)).clamp(min=0)
        first = (first - -(-over // self.dilation) * self.dilation).clamp(min=0)
        first = torch.where(first % self.dilation == c % self.dilation, first, c % self.dilation)
        delta = c[None] - first[:, None]
        return (delta >= 0) & (delta <= span) & (delta % self.dilation == 0)

    def count(self) -> Tensor:
        if self.grid or self.dilation > 1 or not self.causal:
            return super().count()
        row = torch.arange(self.offset + 1, self.keys + 1, device=self.sinks.device).double()
        return torch.minimum(row, (self.sinks + self.window)[:, None].double()).sum(-1)[None]


@dataclass(frozen=True, kw_only=True)
class Lines(Selection):
    """Verticals (key columns) and slashes (diagonals, by their distance behind the query), as MInference draws them.

    For the query block whose last row ends at key index `end`, a slash at distance o covers the keys
    [e - block, e) with e = max(end - o, block); overlapping bands are joined in steps of `block` keys (so a run may end
    up to block - 1 keys after its last band). Columns inside a run are not counted twice.
    Lists hold -1 where there is nothing; slashes must hold distance 0.
    """

    verticals: Int[Tensor, "b h v"]
    slashes: Int[Tensor, "b h s"]
    block: int = 64

    def tiles(self) -> Int[Tensor, "b h nqb t"]:
        """First key of every `block`-wide run of each query block, ascending, -1 for none."""
        b, h, _ = self.slashes.shape
        at, n, w = self.slashes.device, self.keys, self.block
        nqb = -(-self.queries // w)
        last = nqb * w + self.offset  # `end` of the last query block; may pass the last key
        present = torch.zeros(b, h, last + 2, dtype=torch.long, device=at)
        present.scatter_(-1, torch.where(self.slashes >= 0, self.slashes + 1, last + 1).long().clamp(max=last + 1), 1)
        # farther[o]: the largest distance in the list that is <= o - 1, or -1
        where = torch.arange(last + 2, device=at) * present
        where[..., 0] = where[..., last + 1] = 0
        farther = where[..., : last + 1].cummax(-1).values - 1
        end = (torch.arange(1, nqb + 1, device=at) * w + self.offset).expand(b, h, nqb)
        tiles, stop = [], torch.zeros(b, h, nqb, dtype=torch.long, device=at)
        while True:
            # the next band edge e > stop: e = max(end - o, w) for distances o < end, so o <= end - stop - 1
            reach = torch.where(stop < w, end, end - stop).clamp(0, last)
            o = farther.gather(-1, reach)
            e = (end - o).clamp(min=w)
            live = (o >= 0) & (e > stop) & (stop < n)
            if not live.any():
                break
            start = torch.where((e > stop + w) | (stop == 0), e - w, stop)
            tiles.append(torch.where(live & (start < n), start, -1))
            stop = torch.where(live, start + w, n)
        if not tiles:
            return torch.full((b, h, nqb, 0), -1, dtype=torch.int32, device=at)
        return torch.stack(tiles, -1).int()

    def gather(self) -> Gather:
        """The same pairs as key lists and ranges."""
        tiles = self.tiles()
        start, end = tiles, torch.where(tiles >= 0, tiles + self.block, -1).clamp(max=self.keys)
        column = self.verticals[:, :, None].expand(-1, -1, tiles.shape[2], -1).contiguous()
        # the last run that starts at or before the column; -1, the filler, goes to the end of the order
        ordered = torch.nn.functional.pad(torch.where(tiles >= 0, tiles, self.keys), (1, 0), value=-self.block)
        nearest = ordered.gather(-1, torch.searchsorted(ordered, column, right=True) - 1)
        inside = column < nearest + self.block
        limit = (torch.arange(1, tiles.shape[2] + 1, device=tiles.device) * self.block + self.offset)[:, None]
        use = (column >= 0) & ~inside & (column < limit if self.causal else column < self.keys)
        ranges = torch.stack([start.clamp(min=0), end.clamp(min=0)], -1).int()
        return Gather(
            index=torch.where(use, column, -1).int(),
            ranges=ranges,
            q_block=self.block,
            queries=self.queries,
            keys=self.keys,
            causal=self.causal,
        )

    def _pairs(self) -> Tensor:
        return self.gather()._pairs()

    def count(self) -> Tensor:
        return self.gather().count()


@dataclass(frozen=True)
class Places:
    """Buckets in order: query `q_order[i]` sees `k_order[low[i] : high[i]]`, but for [hole_low[i], hole_high[i]) of it.

    low and high never fall from one i to the next. Rows that see nothing: low = high = 0. Int32.
    """

    q_order: Int[Tensor, "b h q"]
    k_order: Int[Tensor, "b h m"]
    low: Int[Tensor, "b h q"]
    high: Int[Tensor, "b h q"]
    hole_low: Int[Tensor, "b h q"] | None = None
    hole_high: Int[Tensor, "b h q"] | None = None

    def to(self, device: torch.device) -> Places:
        """There, the last axis of each in one piece."""
        given = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return Places(**{n: x if x.stride(-1) == 1 else x.contiguous() for n, x in given.items()})


@dataclass(frozen=True, kw_only=True)
class Buckets(Selection):
    """Queries see the keys of their own bucket: clusters or hashes. -1: in no bucket.

    `family`: where above 0, buckets are families of so many that follow on one another, the first from 0 on, and a
    query sees the keys of the others of its family instead; not with `causal`.
    `q_order`, `k_order`: indices in the order of their buckets, where they are known already. With `causal` the keys
    and the queries of a bucket must then ascend. Keys of no bucket may be left out.
    """

    q_bucket: Int[Tensor, "b h q"]
    k_bucket: Int[Tensor, "b h k"]
    family: int = 0
    q_order: Int[Tensor, "b h q"] | None = None
    k_order: Int[Tensor, "b h m"] | None = None

    def __post_init__(self):
        assert not (self.family and self.causal), "the other buckets of a family, causally, are no range of keys"

    def _pairs(self) -> Tensor:
        q, k = rearrange(self.q_bucket, "b h q -> b h q 1"), rearrange(self.k_bucket, "b h k -> b h 1 k")
        seen = (q // self.family == k // self.family) & (q != k) if self.family else q == k
        return seen & (q >= 0) & (k >= 0)

    def places(self) -> Places:
        """In order, with what each query sees as a range. Linear in memory."""
        q_order, k_order = (
            (bucket.sort(stable=True).indices if order is None else order).long()
            for bucket, order in ((self.q_bucket, self.q_order), (self.k_bucket, self.k_order))
        )
        q, k = self.q_bucket.long().gather(-1, q_order), self.k_bucket.long().gather(-1, k_order)
        rows = torch.broadcast_shapes(q.shape[:2], k.shape[:2])
        q, k = q.expand(*rows, -1).contiguous(), k.expand(*rows, -1).contiguous()

        def find(value: Tensor, right: bool = False) -> Tensor:
            return torch.searchsorted(k, value.contiguous(), right=right, out_int32=True).masked_fill_(q < 0, 0)

        orders = q_order.int(), k_order.int()
        if self.family:
            first = q.div(self.family, rounding_mode="floor") * self.family
            return Places(*orders, find(first), find(first + self.family), find(q), find(q, right=True))
        low = find(q)
        if self.causal:  # by bucket and position
            k = k * (self.keys + 1) + k_order
            q = torch.where(q >= 0, q * (self.keys + 1) + q_order + self.offset, -1)
        return Places(*orders, low, find(q, right=True))

    def count(self) -> Tensor:
        p = self.places()
        pairs = (p.high - p.low).double().sum(-1)
        if p.hole_low is None or p.hole_high is None:
            return pairs
        return pairs - (p.hole_high - p.hole_low).double().sum(-1)


@dataclass(frozen=True, kw_only=True)
class PerHead(Selection):
    """Different kinds for different query heads: pairs of (head indices, selection over just those heads)."""

    parts: tuple[tuple[Int[Tensor, " heads"], Selection], ...]

    def _spread(self, values: list[Tensor]) -> Tensor:
        heads = torch.cat([heads for heads, _ in self.parts])
        b = max(v.shape[0] for v in values)
        full = torch.cat([v.expand(b, len(h), *v.shape[2:]) for v, (h, _) in zip(_beside(values), self.parts)], 1)
        return full[:, torch.argsort(heads).to(full.device)]

    def _pairs(self) -> Tensor:
        return self._spread([s.mask() for _, s in self.parts])

    def count(self) -> Tensor:
        return self._spread([s.count() for _, s in self.parts])


@dataclass(frozen=True, kw_only=True)
class Together(Selection):
    """Disjoint selections of any kind, under one softmax. A pair of part i counts `times[i]` times in it, as if
    log(times[i]) were added to its logit: keys that were drawn stand for all that could have been.

    `causal`: that all parts are, by their own causality or by what they list.
    """

    parts: tuple[Selection, ...]
    times: tuple[float, ...]

    def _pairs(self) -> Tensor:
        return functools.reduce(torch.logical_or, _beside([part.mask() for part in self.parts]))

    def count(self) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*_beside([part.count() for part in self.parts]))).sum(0)


def _beside(tensors: list[Tensor]) -> list[Tensor]:
    """On one device: `Spans` may lie on the CPU where other parts are on a GPU."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    return [t.to(device) for t in tensors]


def dense(queries: int, keys: int, causal: bool = True) -> Spans:
    """Every pair."""
    wide = torch.full((1,), max(keys, queries, 1))  # not causal: a query may lie before all keys, if there are more
    return Spans(sinks=torch.zeros(1, dtype=torch.long), window=wide, queries=queries, keys=keys, causal=causal)
