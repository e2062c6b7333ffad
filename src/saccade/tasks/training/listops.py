"""Nested lists of digits with an operation each: what the whole comes to is asked for."""

from __future__ import annotations

from random import Random

import torch

from saccade.core import rng
from saccade.tasks.training._base import IGNORED, Batch, TrainingTask

OPERATIONS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda given: sorted(given)[len(given) // 2] if len(given) % 2 else _middle(given),
    "[SM": lambda given: sum(given) % 10,
}
WORDS = [str(digit) for digit in range(10)] + [*OPERATIONS, "]", "="]
DEPTH, ARGUMENTS = 5, 5  # at most
NESTED = 0.3  # how likely an argument is a list
JUDGED = 512  # held-out rows


class ListOps(TrainingTask):
    """[MAX 2 9 [MIN 4 7 ] 0 ] = and the digit it comes to, 9, which is asked behind "=" and never shown.

    Lists have 2 to 5 arguments and are nested at most 5 deep. One follows the other until the row is full, and the last
    may be cut off; those that fit no row are drawn anew.
    Source: Nangia and Bowman 2018, ListOps, arXiv 1804.06028; arXiv 2011.04006, section 2.2, for long ones.
    """

    name = "listops"
    title = "value of nested list operations, generated"
    kind = "language"
    metric = "accuracy"
    vocabulary = 16
    tokens = 64
    least_tokens = 16
    rows = 64
    steps = 1000

    def batch(self, step, rows, seed):
        return self._rows(rng.python("train/listops", seed, step), rows)

    def held_out(self, rows):
        draw = rng.python("held-out/listops")
        return [self._rows(draw, min(rows, JUDGED - i)) for i in range(0, JUDGED, rows)]

    def _rows(self, draw: Random, rows: int) -> Batch:
        filled = [self._row(draw) for _ in range(rows)]
        return Batch(*(torch.tensor(part) for part in zip(*filled)))

    def _row(self, draw: Random) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        targets: list[int] = []
        while len(ids) < self.tokens:
            words, value = expression(draw, DEPTH)
            if len(words) < self.tokens:
                ids += [WORDS.index(word) for word in [*words, "="]]
                targets += [IGNORED] * len(words) + [value]
        return ids[: self.tokens], targets[: self.tokens]


def expression(draw: Random, depth: int) -> tuple[list[str], int]:
    """A list in words, and what it comes to."""
    name = draw.choice(list(OPERATIONS))
    words, values = [name], []
    for _ in range(draw.randint(2, ARGUMENTS)):
        if depth > 1 and draw.random() < NESTED:
            inner, value = expression(draw, depth - 1)
        else:
            value = draw.randrange(10)
            inner = [str(value)]
        words, values = words + inner, [*values, value]
    return [*words, "]"], OPERATIONS[name](values)


def _middle(given: list[int]) -> int:
    """Of an even number of digits: half of the two middle ones together, rounded down."""
    ordered = sorted(given)
    return (ordered[len(given) // 2 - 1] + ordered[len(given) // 2]) // 2
