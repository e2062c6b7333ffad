"""What methods remember of each sequence between forwards.

Sequences that are read together are remembered together: what a method left is handed to it again as it is. It is taken
apart only where sequences part.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain

import torch
from torch import Tensor

from saccade.core.site import State


class Remembered:
    """Of one method: for each sequence a batch of rows, [b ...] each, and its place in it. Nothing: an empty batch."""

    def __init__(self, sequences: int):
        self.rows: list[tuple[State, int]] = [({}, 0)] * sequences

    def gather(self, sequences: Sequence[int]) -> State:
        """What all of these sequences remember, a row for each."""
        mine = [self.rows[i] for i in sequences]
        batch = mine[0][0]
        if all(b is batch for b, _ in mine) and [place for _, place in mine] == list(range(_size(batch))):
            return dict(batch)
        shared = set(batch).intersection(*(b for b, _ in mine))
        return {name: torch.cat([b[name][place : place + 1] for b, place in mine]) for name in shared}

    def keep(self, sequences: Sequence[int], state: State) -> None:
        """In the place of what these sequences remembered; others that were remembered with them get a copy."""
        left = {id(self.rows[i][0]) for i in sequences}
        for place, i in enumerate(sequences):
            self.rows[i] = (state, place)
        self.rows = [_alone(*row) if id(row[0]) in left else row for row in self.rows]

    def kinds(self) -> list[Hashable]:
        """For each sequence something that is alike where names and shapes are."""
        found = {id(b): frozenset((name, x.shape[1:]) for name, x in b.items()) for b, _ in self.rows}
        return [found[id(b)] for b, _ in self.rows]

    def select(self, order: Sequence[int]) -> Remembered:
        """New sequence i remembers what the old sequence order[i] did."""
        made = Remembered(0)
        one = list(order) == list(range(len(self.rows)))
        apart = {} if one else {i: _alone(*self.rows[i]) for i in order}
        made.rows = list(self.rows) if one else [apart[i] for i in order]
        return made

    def blank(self, sequences: Sequence[int]) -> None:
        """Sequences that began empty remember nought where others remember something, so that all have the same
        names."""
        like = next((b for b, _ in self.rows if b), {})
        for i in sequences if like else ():
            self.rows[i] = ({name: torch.zeros_like(x[:1]) for name, x in like.items()}, 0)

    @staticmethod
    def joined(several: Sequence[Remembered]) -> Remembered:
        """Behind one another."""
        made = Remembered(0)
        made.rows = list(chain.from_iterable(x.rows for x in several))
        return made

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        batches = {id(b): b for b, _ in self.rows}
        return [x for batch in batches.values() for x in batch.values()]


def _size(batch: State) -> int:
    return next(iter(batch.values())).shape[0] if batch else 1


def owned(state: State) -> State:
    """With copies of views, which would hold on to all that they are a part of."""
    return {name: x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for name, x in state.items()}


def _alone(batch: State, place: int) -> tuple[State, int]:
    return {name: x[place : place + 1].clone() for name, x in batch.items()}, 0
