"""The keys and values of one layer, ragged: each (sequence, key/value head) is a row with a length of its own.

Rows of equal length lie together in a bucket, so that nothing is padded and equal rows still make one tensor. Bytes are
those of the tensors' storages. Beside keys and values, a bucket may hold further columns per token (labels of an
index); they follow every operation. The first tokens of a row may lie packed, some to a unit: then columns hold the
tokens behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.errors import CannotRun

Columns = dict[str, Tensor]  # each [r n ...]
SPARE = 64  # a row that grows by itself gets room for one more token in so many: else each token copies all before it


@dataclass
class Space:
    """Memory behind the rows of a bucket, and up to where somebody has written. Buckets that grew out of one another
    share it; one that is not the last of them copies before it grows again."""

    used: int
    tokens: int


@dataclass(frozen=True)
class Bucket:
    """Rows of one length. `rows` are ascending row numbers, sequence * kv_heads + head; positions are true ones.

    packed: [r u ...] each, units of the first tokens
    sinks: first tokens of the text that are stored before a gap; all tokens behind the gap are. None: not known
    """

    rows: Int[Tensor, " r"]
    positions: Int[Tensor, "r n"]
    columns: Columns
    packed: Columns = field(default_factory=dict)
    space: Space | None = None
    sinks: int | None = None

    @property
    def length(self) -> int:
        """Tokens stored in each of these rows."""
        return self.positions.shape[1]

    @property
    def front(self) -> int:
        """How many first tokens of each of these rows lie packed."""
        return self.length - self.columns["keys"].shape[1]

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [self.rows, self.positions, *self.columns.values(), *self.packed.values()]

    def bits(self) -> Float[Tensor, " n"]:
        """Held of a number of each token, which all rows have alike."""
        keys, values = (self.columns[name] for name in ("keys", "values"))
        out = torch.full((self.length,), 8.0 * keys.element_size())
        if self.front:
            held = sum(x[0].numel() * x.element_size() for x in self.packed.values())
            out[: self.front] = 8.0 * held / (self.front * (keys.shape[-1] + values.shape[-1]))
        return out

    def moved(self, device: torch.device) -> Bucket:
        """A copy on another device. Room behind the rows does not come along."""
        columns, packed = ({name: c.to(device) for name, c in x.items()} for x in (self.columns, self.packed))
        return Bucket(self.rows.to(device), self.positions.to(device), columns, packed, sinks=self.sinks)

    def pick(self, entries: Int[Tensor, " m"]) -> Bucket:
        """Some of the rows, by their place in the bucket; may repeat."""
        chosen, packed = (
            {name: c.index_select(0, entries) for name, c in columns.items()} for columns in (self.columns, self.packed)
        )
        return Bucket(self.rows[entries], self.positions.index_select(0, entries), chosen, packed, sinks=self.sinks)

    def out_of_reach(self, sinks: int, recent: int, query: int, seen: int) -> tuple[int, int] | None:
        """Slots, first and count, that a query at that position does not see, if it sees the first `sinks` tokens and
        `recent` before itself, and `seen` tokens went by. None: it cannot be told without reading positions.
        """
        first = self.length if self.length == seen else self.sinks
        if first is None:
            return None
        behind, start = seen - (self.length - first), query - recent  # the first behind the gap, the first in reach
        if sinks > first:
            return (first, max(0, start - behind)) if behind >= min(sinks, seen) else None
        return sinks, max(0, min(first, start) - sinks) + max(0, start - behind)

    def take(self, index: Int[Tensor, "r m"]) -> Bucket:
        """Some of the tokens of every row, before any is packed."""
        assert not self.packed, "what is packed stays"
        chosen = {name: _tokens(c, index) for name, c in self.columns.items()}
        return Bucket(self.rows, _tokens(self.positions, index), chosen)

    def without(self, first: int, count: int) -> Bucket:
        """All but `count` tokens from the slot `first` on, in every row, before any is packed."""
        assert not self.packed, "what is packed stays"
        left = {name: torch.cat([c[:, :first], c[:, first + count :]], 1) for name, c in self._all().items()}
        two = self.sinks is not None and first + count < self.sinks  # gaps: this one and that behind it
        return Bucket(self.rows, left.pop(""), left, sinks=None if two else first)

    def _all(self) -> Columns:
        return {"": self.positions, **self.columns}

    def append(self, positions: Int[Tensor, "r n"], columns: Columns) -> Bucket:
        """More tokens at the end of every row."""
        old, new = self._all(), {"": positions, **columns}
        more, space = positions.shape[1], self.space
        if any(x.requires_grad for x in (*old.values(), *new.values())):
            space, joined = None, {name: torch.cat([x, new[name]], 1) for name, x in old.items()}
        elif space is not None and space.used == self.length and self.length + more <= space.tokens:
            space.used += more
            joined = {name: _written(_longer(x, more), new[name]) for name, x in old.items()}
        else:
            room = (self.length - self.front) // SPARE
            space = Space(self.length + more, self.length + more + room) if room else None
            joined = {name: _written(_moved(x, more, room), new[name]) for name, x in old.items()}
        return Bucket(self.rows, joined.pop(""), joined, self.packed, space, self.sinks)


def _longer(column: Tensor, more: int) -> Tensor:
    """With the memory behind it."""
    r, n = column.shape[:2]
    assert not r or column.stride(0) >= (n + more) * column.stride(1), "memory that is not there"
    return column.as_strided((r, n + more, *column.shape[2:]), column.stride())


def _moved(column: Tensor, more: int, room: int) -> Tensor:
    """A copy with `more` tokens behind it that nobody has written yet, and memory for `room` others."""
    (r, n), rest = column.shape[:2], column.shape[2:]
    made = column.new_empty(r, n + more + room, *rest)
    made[:, :n] = column
    return made[:, : n + more]


def _written(column: Tensor, new: Tensor) -> Tensor:
    column[:, column.shape[1] - new.shape[1] :] = new
    return column


def _tokens(column: Tensor, index: Int[Tensor, "r m"]) -> Tensor:
    """The tokens `index` of each row of a column [r n ...]."""
    shape = (*index.shape, *[1] * (column.dim() - 2))
    return column.gather(1, index.view(shape).expand(*index.shape, *column.shape[2:]))


def regroup(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Join buckets of equal length, packed as far, and sort their rows."""
    by_length: dict[tuple[int, ...], list[Bucket]] = {}
    for bucket in buckets:
        if bucket.rows.shape[0]:
            sizes = (x.shape[1] for x in bucket.packed.values())  # of one front more may lie in fewer bits
            by_length.setdefault((bucket.length, bucket.front, *sizes), []).append(bucket)
    return [_join(some) for _, some in sorted(by_length.items(), reverse=True)]


def numbers(rows: Int[Tensor, " r"]) -> list[int]:
    """The same on the host. The device is asked once: buckets that grow out of one another share this tensor."""
    if not hasattr(rows, "_numbers"):
        rows._numbers = rows.tolist()
    return rows._numbers


def _join(buckets: list[Bucket]) -> Bucket:
    if len(buckets) == 1:
        return buckets[0]
    rows, order = torch.cat([b.rows for b in buckets]).sort()
    columns, packed = (
        {name: torch.cat([x[name] for x in parts]).index_select(0, order) for name in parts[0]}
        for parts in ([b.columns for b in buckets], [b.packed for b in buckets])
    )
    positions = torch.cat([b.positions for b in buckets]).index_select(0, order)
    (sinks, *others) = {b.sinks for b in buckets}
    return Bucket(rows, positions, columns, packed, sinks=None if others else sinks)


class Store:
    """All buckets of one layer's cache."""

    def __init__(self, sequences: int, kv_heads: int):
        self.sequences, self.kv_heads = sequences, kv_heads
        self.seen = [0] * sequences  # real tokens that went by, per sequence
        self.dropped = False  # whether anything was ever evicted
        self.buckets: list[Bucket] = []

    def append(self, columns: Columns, real: Bool[Tensor, "b n"] | None) -> None:
        """New tokens for all sequences, columns [b g n ...]; only the real ones are stored."""
        counts = [columns["keys"].shape[2]] * self.sequences if real is None else real.sum(-1).tolist()
        flat = {name: c.flatten(0, 1) for name, c in columns.items()}
        if not self.buckets:
            device = columns["keys"].device
            empty = {name: c[:, :0] for name, c in flat.items()}
            rows = torch.arange(self.sequences * self.kv_heads, device=device)
            self.buckets = [Bucket(rows, torch.zeros(len(rows), 0, dtype=torch.int32, device=device), empty)]
        pieces = [self._grown(part, count, flat, real) for count, part in self.pieces(counts)]
        self.buckets = pieces if len(pieces) == 1 else regroup(pieces)
        self.seen = [s + c for s, c in zip(self.seen, counts)]

    def _grown(self, bucket: Bucket, count: int, flat: Columns, real: Tensor | None) -> Bucket:
        """Rows that all get so many new tokens, and these."""
        whole = len(numbers(bucket.rows)) == self.sequences * self.kv_heads
        new = flat if whole else {name: c.index_select(0, bucket.rows) for name, c in flat.items()}
        if real is not None:
            sequence = bucket.rows // self.kv_heads
            token = real[sequence].nonzero()[:, 1].view(len(sequence), count)
            new = {name: _tokens(c, token) for name, c in new.items()}
        return bucket.append(self._next(bucket, count), new)

    def _next(self, bucket: Bucket, count: int) -> Int[Tensor, "r n"]:
        """The positions after the last one seen; where all are alike, nothing is copied from the host."""
        seen, device = [self.seen[i] for i in self.sequence_of(bucket)], bucket.rows.device
        if len(set(seen)) == 1:
            return torch.arange(seen[0], seen[0] + count, dtype=torch.int32, device=device).expand(len(seen), -1)
        first = torch.tensor(seen, dtype=torch.int32, device=device)
        return first[:, None] + torch.arange(count, dtype=torch.int32, device=device)

    def sequence_of(self, bucket: Bucket) -> list[int]:
        """The sequence of each row of a bucket."""
        return [row // self.kv_heads for row in numbers(bucket.rows)]

    def pieces(self, counts: Sequence[int]) -> Iterable[tuple[int, Bucket]]:
        """(new tokens, rows): rows of one length whose sequences all got the same number of new tokens."""
        if len(set(counts)) == 1:
            yield from ((counts[0], bucket) for bucket in self.buckets)
            return
        for bucket in self.buckets:
            yield from self.parts(bucket, [counts[i] for i in self.sequence_of(bucket)])

    def parts(self, bucket: Bucket, marks: Sequence[Any]) -> Iterable[tuple[Any, Bucket]]:
        """(mark, rows): the rows of a bucket, which have a mark each, by their marks."""
        entries: dict[Any, list[int]] = {}
        for entry, mark in enumerate(marks):
            entries.setdefault(mark, []).append(entry)
        for mark, some in entries.items():
            if len(some) == len(marks):
                yield mark, bucket
                continue
            part = bucket.pick(torch.tensor(some, device=bucket.rows.device))
            part.rows._numbers = [numbers(bucket.rows)[entry] for entry in some]
            yield mark, part

    def whole_sequences(self, bucket: Bucket) -> list[int] | None:
        """The sequences in a bucket if all of their heads are in it, else None."""
        if len(numbers(bucket.rows)) == self.kv_heads * self.sequences:
            return list(range(self.sequences))
        sequences = list(dict.fromkeys(self.sequence_of(bucket)))
        whole = [i * self.kv_heads + head for i in sequences for head in range(self.kv_heads)]
        return sequences if whole == numbers(bucket.rows) else None

    def keep(self, bucket: Bucket, mask: Bool[Tensor, "r n"]) -> list[Bucket]:
        """The bucket with only the marked tokens, split by how many those are; order is kept."""
        counts = mask.sum(-1)
        if bool((counts == bucket.length).all()):
            return [bucket]
        self.dropped = True
        out = []
        for count in counts.unique():
            part = (counts == count).nonzero()[:, 0]
            index = mask[part].nonzero()[:, 1].view(len(part), int(count))
            out.append(bucket.pick(part).take(index))
        return out

    def move(self, device: torch.device) -> None:
        """All of it to a device; what lies there stays as it is, with the room behind it."""
        self.buckets = [b if b.rows.device == device else b.moved(device) for b in self.buckets]

    def add(self, name: str, rows: Int[Tensor, " r"], x: Tensor) -> None:
        """Add to a column of some rows, which lie in one bucket. Into a copy: another cache may hold the old one."""
        i, place = self._find(rows)
        self._set(i, {**self.buckets[i].columns, name: self.buckets[i].columns[name].index_add(0, place, x)})

    def put(self, name: str, rows: Int[Tensor, " r"], x: Tensor) -> None:
        """Set a column of some rows, which lie in one bucket, in a copy."""
        i, place = self._find(rows)
        self._set(i, {**self.buckets[i].columns, name: self.buckets[i].columns[name].index_copy(0, place, x)})

    def forget(self, name: str) -> None:
        """Give a column up."""
        for i, bucket in enumerate(self.buckets):
            self._set(i, {other: column for other, column in bucket.columns.items() if other != name})

    def _set(self, i: int, columns: Columns) -> None:
        """Other columns for a bucket, in a list of its own: another store may share the old one."""
        changed = replace(self.buckets[i], columns=columns, space=None)
        self.buckets = [*self.buckets[:i], changed, *self.buckets[i + 1 :]]

    def _find(self, rows: Int[Tensor, " r"]) -> tuple[int, Int[Tensor, " r"]]:
        """The bucket that some rows lie in, and their places there."""
        wanted = numbers(rows)
        for i, bucket in enumerate(self.buckets):
            places = {row: place for place, row in enumerate(numbers(bucket.rows))}
            if places.keys() >= set(wanted):
                return i, torch.tensor([places[row] for row in wanted], device=rows.device)
        raise AssertionError("these rows are in no bucket")

    def crop(self, tokens: int) -> None:
        """Take the last tokens of every row back. Eviction and packing wait while that may happen, where they can.

        Raises:
            CannotRun: some of them are packed.
        """
        loose = min(b.length - b.front for b in self.buckets)
        if any(b.packed for b in self.buckets) and tokens > loose:
            do = "Take back fewer, or call activate_past_recording() on the cache's layers before they are read."
            raise CannotRun(f"take back {tokens} tokens", f"all but the last {loose} are packed in some row", do)
        self.seen = [s - tokens for s in self.seen]
        cut = []
        for b in self.buckets:
            assert b.length >= tokens, "tokens were evicted before they could be taken back"
            kept = {name: c[:, : c.shape[1] - tokens].clone() for name, c in b.columns.items()}
            cut.append(Bucket(b.rows, b.positions[:, : b.length - tokens].clone(), kept, b.packed))
        self.buckets = cut

    def select_sequences(self, index: Int[Tensor, " m"]) -> None:
        """New sequence i is the old sequence index[i]: beam reordering, batch selection, repetition."""
        g = self.kv_heads
        source = (index[:, None] * g + torch.arange(g, device=index.device)).flatten()
        out = []
        for b in self.buckets:
            place = torch.full((self.sequences * g,), -1, device=index.device)
            place[b.rows] = torch.arange(len(b.rows), device=index.device)
            entries = place[source]
            rows = (entries >= 0).nonzero()[:, 0]
            out.append(replace(b.pick(entries[rows]), rows=rows))
        self.buckets = [b for b in out if len(b.rows)]
        self.sequences = len(index)
        self.seen = [self.seen[i] for i in index.tolist()]

    def take_in(self, others: Iterable[Store]) -> None:
        """The sequences of other stores join behind those that are here."""
        buckets = list(self.buckets)
        for other in others:
            first = self.sequences * self.kv_heads
            buckets += [replace(b, rows=b.rows + first) for b in other.buckets]
            self.sequences += other.sequences
            self.seen = self.seen + other.seen
            self.dropped = self.dropped or other.dropped
        self.buckets = regroup(buckets)

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [t for bucket in self.buckets for t in bucket.tensors()]

    def kept(self) -> list[list[Tensor]]:
        """True positions stored, per sequence and head."""
        return self._by_head((b, b.positions.cpu()) for b in self.buckets)

    def bits(self) -> list[list[Tensor]]:
        """Bits held of a number of each stored token, per sequence and head, with what packing keeps beside them."""
        return self._by_head((b, b.bits().expand(len(b.rows), -1)) for b in self.buckets)

    def _by_head(self, found: Iterable[tuple[Bucket, Tensor]]) -> list[list[Tensor]]:
        """What each bucket says of its rows [r n], per sequence and head."""
        out: list[list[Tensor]] = [[torch.empty(0)] * self.kv_heads for _ in range(self.sequences)]
        for bucket, rows in found:
            for row, mine in zip(numbers(bucket.rows), rows):
                out[row // self.kv_heads][row % self.kv_heads] = mine
        return out


def by_head(columns: Mapping[str, Tensor], kv_heads: int) -> Columns:
    """Columns of rows [r n ...] as [b g n ...]."""
    return {name: c.unflatten(0, (-1, kv_heads)) for name, c in columns.items()}
