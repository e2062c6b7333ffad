"""Associative recall, many questions to a row: what attention does and a fixed state cannot."""

from __future__ import annotations

import torch

from saccade.core import rng
from saccade.core.errors import BadOption
from saccade.tasks.training._base import IGNORED, Batch, TrainingTask

ALPHA = 0.01  # gaps x are drawn with p(x) ~ x^(alpha - 1): short ones are likelier
PER_PAIR = 16  # tokens of a row for each pair in it
JUDGED = 512  # held-out rows


class MQAR(TrainingTask):
    """Pairs of key and value, then each key again, once, at a drawn distance: its value is to be told there.

    A row of n tokens has n / 16 pairs. Keys and values have a half of the vocabulary each; between lies token 0.
    Accuracy is the share of all questions answered exactly, over the whole vocabulary.
    Source: arXiv 2312.04927, section 4 and appendix; HazyResearch/zoology, zoology/data/multiquery_ar.py.
    """

    name = "mqar"
    title = "multi-query associative recall, generated"
    kind = "language"
    metric = "accuracy"
    vocabulary = 64
    tokens = 64
    least_tokens = 16
    rows = 64
    steps = 2000

    def __init__(self, tokens=None):
        super().__init__(tokens)
        self.pairs = self.tokens // PER_PAIR
        if self.tokens % 2 or self.pairs >= self.vocabulary // 2:
            found = f"their number must be even and below {PER_PAIR * self.vocabulary // 2}"
            raise BadOption(f"mqar with {self.tokens} tokens", found, "Change it.")

    def batch(self, step, rows, seed):
        return self._rows(rows, rng.generator("train/mqar", seed, step))

    def held_out(self, rows):
        whole = self._rows(JUDGED, rng.generator("held-out/mqar"))
        return [whole.rows(slice(i, i + rows)) for i in range(0, JUDGED, rows)]

    def _rows(self, rows: int, draw: torch.Generator) -> Batch:
        pairs, half = self.pairs, self.vocabulary // 2
        keys = 1 + _distinct(torch.ones(rows, half - 1), pairs, draw)
        values = half + _distinct(torch.ones(rows, half), pairs, draw)
        places = (self.tokens - 2 * pairs) // 2
        likely = torch.arange(1, places + 1, dtype=torch.float64) ** (ALPHA - 1)
        asked = 2 * pairs + 2 * _distinct(likely.expand(rows, -1), pairs, draw)
        inputs = torch.zeros(rows, self.tokens, dtype=torch.long)
        inputs[:, : 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
        inputs.scatter_(1, asked, keys)
        return Batch(inputs, torch.full_like(inputs, IGNORED).scatter_(1, asked, values))


def _distinct(weights: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Of each row so many places, by their weights, none twice."""
    return torch.multinomial(weights, count, replacement=False, generator=draw)
