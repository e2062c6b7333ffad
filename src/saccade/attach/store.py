"""The keys and values of one layer, ragged: each (sequence, key/value head) is a row with a length of its own.

Rows of equal length lie together in a bucket, so that nothing is padded and equal rows still make one tensor. Bytes are
those of the tensors' storages. Beside keys and values, a bucket may hold further columns per token (labels of an
index); they follow every operation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Columns = dict[str, Tensor]  # each [r n ...]


@dataclass(frozen=True)
class Bucket:
    """Rows of one length. `rows` are ascending row numbers, sequence * kv_heads + head; positions are true ones."""

    rows: Int[Tensor, " r"]
    positions: Int[Tensor, "r n"]
    columns: Columns

    @property
    def length(self) -> int:
        """Tokens stored in each of these rows."""
        return self.positions.shape[1]

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [self.rows, self.positions, *self.columns.values()]

    def pick(self, entries: Int[Tensor, " m"]) -> Bucket:
        """Some of the rows, by their place in the bucket; may repeat."""
        chosen = {name: c.index_select(0, entries) for name, c in self.columns.items()}
        return Bucket(self.rows[entries], self.positions.index_select(0, entries), chosen)

    def take(self, index: Int[Tensor, "r m"]) -> Bucket:
        """Some of the tokens of every row."""
        chosen = {name: _tokens(c, index) for name, c in self.columns.items()}
        return Bucket(self.rows, _tokens(self.positions, index), chosen)

    def append(self, positions: Int[Tensor, "r n"], columns: Columns) -> Bucket:
        """More tokens at the end of every row."""
        joined = {name: torch.cat([c, columns[name]], 1) for name, c in self.columns.items()}
        return Bucket(self.rows, torch.cat([self.positions, positions], 1), joined)


def _tokens(column: Tensor, index: Int[Tensor, "r m"]) -> Tensor:
    """The tokens `index` of each row of a column [r n ...]."""
    shape = (*index.shape, *[1] * (column.dim() - 2))
    return column.gather(1, index.view(shape).expand(*index.shape, *column.shape[2:]))


def regroup(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Join buckets of equal length and sort their rows."""
    by_length: dict[int, list[Bucket]] = {}
    for bucket in buckets:
        if len(bucket.rows):
            by_length.setdefault(bucket.length, []).append(bucket)
    return [_join(some) for _, some in sorted(by_length.items(), reverse=True)]


def _join(buckets: list[Bucket]) -> Bucket:
    if len(buckets) == 1:
        return buckets[0]
    rows, order = torch.cat([b.rows for b in buckets]).sort()
    names = buckets[0].columns
    columns = {n: torch.cat([b.columns[n] for b in buckets]).index_select(0, order) for n in names}
    return Bucket(rows, torch.cat([b.positions for b in buckets]).index_select(0, order), columns)


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
        pieces = [self._grown(bucket, flat, real, counts) for bucket in self.buckets]
        self.buckets = pieces[0] if len(pieces) == 1 and len(pieces[0]) == 1 else regroup(itertools.chain(*pieces))
        self.seen = [s + c for s, c in zip(self.seen, counts)]

    def _grown(self, bucket: Bucket, flat: Columns, real: Tensor | None, counts: list[int]) -> list[Bucket]:
        out = []
        for count, ids in self._by_count(bucket, counts):
            part = bucket if len(ids) == len(bucket.rows) else bucket.pick(ids)
            sequence = part.rows // self.kv_heads
            start = torch.tensor(self.seen, device=part.rows.device)[sequence]
            positions = (start[:, None] + torch.arange(count, device=start.device)).int()
            whole = len(part.rows) == self.sequences * self.kv_heads
            new = flat if whole else {name: c.index_select(0, part.rows) for name, c in flat.items()}
            if real is not None:
                token = real[sequence].nonzero()[:, 1].view(len(sequence), count)
                new = {name: _tokens(c, token) for name, c in new.items()}
            out.append(part.append(positions, new))
        return out

    def _by_count(self, bucket: Bucket, counts: list[int]) -> list[tuple[int, Tensor]]:
        """(number of new tokens, rows of the bucket that get that many)."""
        if len(set(counts)) == 1:
            return [(counts[0], torch.arange(len(bucket.rows), device=bucket.rows.device))]
        per_row = torch.tensor(counts, device=bucket.rows.device)[bucket.rows // self.kv_heads]
        return [(int(c), (per_row == c).nonzero()[:, 0]) for c in per_row.unique()]

    def pieces(self, counts: list[int]) -> Iterable[tuple[int, Bucket]]:
        """(new tokens, rows): rows of one length whose sequences all got the same number of new tokens."""
        for bucket in self.buckets:
            for count, ids in self._by_count(bucket, counts):
                yield count, bucket if len(ids) == len(bucket.rows) else bucket.pick(ids)

    def whole_sequences(self, bucket: Bucket) -> list[int] | None:
        """The sequences in a bucket if all of their heads are in it, else None."""
        g = self.kv_heads
        heads = torch.arange(g, device=bucket.rows.device)
        if len(bucket.rows) % g or not torch.equal(bucket.rows.view(-1, g) % g, heads.expand(len(bucket.rows) // g, g)):
            return None
        return (bucket.rows[::g] // g).tolist()

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
        """All of it to a device."""
        self.buckets = [
            Bucket(b.rows.to(device), b.positions.to(device), {n: c.to(device) for n, c in b.columns.items()})
            for b in self.buckets
        ]

    def crop(self, tokens: int) -> None:
        """Take the last tokens of every row back. Eviction waits while that may happen, so they are all there."""
        self.seen = [s - tokens for s in self.seen]
        cut = []
        for b in self.buckets:
            assert b.length >= tokens, "tokens were evicted before they could be taken back"
            kept = {name: c[:, : b.length - tokens].clone() for name, c in b.columns.items()}
            cut.append(Bucket(b.rows, b.positions[:, : b.length - tokens].clone(), kept))
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
            picked = b.pick(entries[rows])
            out.append(Bucket(rows, picked.positions, picked.columns))
        self.buckets = [b for b in out if len(b.rows)]
        self.sequences = len(index)
        self.seen = [self.seen[i] for i in index.tolist()]

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [t for bucket in self.buckets for t in bucket.tensors()]

    def kept(self) -> list[list[Tensor]]:
        """True positions stored, per sequence and head."""
        out: list[list[Tensor]] = [[torch.empty(0)] * self.kv_heads for _ in range(self.sequences)]
        for b in self.buckets:
            for row, positions in zip(b.rows.tolist(), b.positions):
                out[row // self.kv_heads][row % self.kv_heads] = positions.cpu()
        return out
