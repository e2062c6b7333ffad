"""One thing to be found in prose, wherever it is: what a choice by content does and a window cannot."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from saccade.core import rng
from saccade.tasks.training._base import IGNORED, Batch, TrainingTask
from saccade.tasks.training.mobydick import parts

NEEDLES, QUESTION = (3, 4, 5, 6), 1  # control characters, which no prose has
RUN, ASKED = 4, 4  # tokens of the needle, and of the question
JUDGED = 256  # held-out rows


def hidden(
    text: Int[Tensor, " m"], tokens: int, rows: int, draw: torch.Generator, run: int = RUN, asked: int = ASKED
) -> tuple[Int[Tensor, "r n"], Int[Tensor, " r"]]:
    """Rows from random places of a text, in each a needle anywhere before the question, which fills the last places;
    and which needle it is. run, asked: length of the needle and of the question"""
    start = torch.randint(0, len(text) - tokens, (rows, 1), generator=draw)
    ids = text[start + torch.arange(tokens)].long()
    needle = torch.tensor(NEEDLES)[torch.randint(len(NEEDLES), (rows,), generator=draw)]
    place = torch.randint(0, tokens - asked - run + 1, (rows, 1), generator=draw) + torch.arange(run)
    ids.scatter_(1, place, needle[:, None].expand(-1, run))
    ids[:, -asked:] = QUESTION
    return ids, needle


class Needle(TrainingTask):
    """Bytes of Moby-Dick with a needle, one sign of four in a run, anywhere before the last tokens, which ask for it.

    Which needle it was is to be told in each of these last tokens, and nothing else is. A guess is right in a quarter.
    What is held out has its prose from the end of the text.
    """

    name = "needle"
    title = "which of four needles is in 64 bytes of prose, shipped"
    kind = "language"
    metric = "accuracy"
    vocabulary = 256
    tokens = 64
    least_tokens = 16
    channels = 32
    rows = 32
    steps = 400
    learning_rate = 0.01

    def batch(self, step, rows, seed):
        return self._rows(parts()[0], rows, rng.generator("train/needle", seed, step))

    def held_out(self, rows):
        whole = self._rows(parts()[1], JUDGED, rng.generator("held-out/needle"))
        return [whole.rows(slice(i, i + rows)) for i in range(0, JUDGED, rows)]

    def _rows(self, text: Tensor, rows: int, draw: torch.Generator) -> Batch:
        inputs, needle = hidden(text, self.tokens, rows, draw)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -ASKED:] = needle[:, None]
        return Batch(inputs, targets)
