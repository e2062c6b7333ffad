"""The shipped chapters of Moby-Dick, byte by byte."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from saccade.tasks._text import FILE
from saccade.tasks.training._base import TrainingTask
from saccade.tasks.training._bytes import drawn, spread

HELD_OUT = 0.1  # of the text, its end


class MobyDick(TrainingTask):
    """The next byte of the first 27 chapters; the last tenth is held out."""

    name = "mobydick"
    title = "next byte of 248 kB of prose, shipped"
    kind = "language"
    metric = "bits"
    vocabulary = 256
    tokens = 128
    steps = 400

    def batch(self, step, rows, seed):
        return drawn(parts()[0], self.tokens, step, rows, seed, self.name)

    def held_out(self, rows):
        return spread(parts()[1], self.tokens, rows, self.name)


@functools.cache
def parts() -> tuple[Tensor, Tensor]:
    """Bytes of the text, and those of its end, which are held out."""
    text = torch.frombuffer(bytearray(FILE.read_bytes()), dtype=torch.uint8)
    cut = len(text) - int(HELD_OUT * len(text))
    return text[:cut], text[cut:]
