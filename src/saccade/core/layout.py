"""Which tokens of a text each process has, where several processes share them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Chunk = tuple[int, int]  # first token, and the one behind the last


@dataclass(frozen=True)
class Layout:
    """`tokens` of a text among `ranks` processes, of which this one is `rank`.

    folded: each has two chunks, one from the front and one from the back, so that causal attention costs all the same;
        else one chunk, in order. Chunks differ by one token at most
    group: of torch.distributed; None: all processes
    """

    tokens: int
    rank: int
    ranks: int
    folded: bool = False
    group: Any = None

    def chunks(self, rank: int) -> list[Chunk]:
        """The chunks of a process, in order."""
        many = 2 * self.ranks if self.folded else self.ranks
        edges = [self.tokens * i // many for i in range(many + 1)]
        each = [rank, many - 1 - rank] if self.folded else [rank]
        return [(edges[i], edges[i + 1]) for i in each]

    def count(self, rank: int) -> int:
        """Tokens of a process."""
        return sum(last - first for first, last in self.chunks(rank))

    @functools.cached_property
    def counts(self) -> list[int]:
        """Of every process."""
        return [self.count(rank) for rank in range(self.ranks)]

    @property
    def here(self) -> int:
        """Tokens of this process."""
        return self.counts[self.rank]

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """What this process has of what lies along `dim` for all tokens."""
        return torch.cat([x.narrow(dim, first, last - first) for first, last in self.chunks(self.rank)], dim)

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """What lies along `dim` for all tokens, from what every process has."""
        pieces: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            chunks = self.chunks(rank)
            split = part.split([last - first for first, last in chunks], dim)
            pieces |= {first: piece for (first, last), piece in zip(chunks, split) if last > first}
        return torch.cat([pieces[first] for first in sorted(pieces)], dim)
