"""Handwritten digits of 8 x 8 pixels, shipped."""

from __future__ import annotations

import functools
import gzip

import numpy as np
import torch

from saccade.tasks._text import FILE
from saccade.tasks.training._base import TrainingTask
from saccade.tasks.training._pictures import Pictures

HELD_OUT = 0.2
BRIGHTEST = 16


class Digits(TrainingTask):
    """1,797 handwritten digits, a fifth of them held out; every pixel is a token."""

    name = "digits"
    title = "class of handwritten digits, 8 x 8, shipped"
    kind = "vision"
    metric = "accuracy"
    vocabulary = 10
    image = (1, 8, 8)
    patch = 1
    tokens = 64
    rows = 32
    steps = 300

    def batch(self, step, rows, seed):
        return _all().drawn(self.name, step, rows, seed)

    def held_out(self, rows):
        return _all().judged(rows)


@functools.cache
def _all() -> Pictures:
    with gzip.open(FILE.parent / "digits.csv.gz", "rt") as lines:
        table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.int64))
    images = (table[:, :-1].float() / BRIGHTEST).reshape(-1, *Digits.image)
    return Pictures.of("digits", images, table[:, -1], HELD_OUT)
