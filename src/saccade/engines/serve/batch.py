"""Requests that are decoded together: one cache, a row for each, padding on the left."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.attach import caches
from saccade.attach.compat import CACHE
from saccade.core import rng
from saccade.engines.serve.jobs import Event, Job
from saccade.engines.serve.sampling import choose
from saccade.engines.serve.text import Text


class Row:
    """One request among those that are decoded."""

    def __init__(self, job: Job, tokenizer: Any):
        self.job, self.seen = job, len(job.ids)  # tokens in the cache
        self.text = Text(tokenizer, job.wish.stop)
        seed = secrets.randbits(62) if job.wish.seed is None else job.wish.seed
        self._random = rng.python("serve", seed)

    def draw(self) -> float:
        """The next number of its own stream; none is used up where nothing is drawn."""
        return self._random.random() if self.job.wish.temperature else 0.0

    def take(self, token: int, ends: frozenset[int]) -> Event:
        """A new token: what it adds to the text, and whether that was the last."""
        self.job.tokens.append(token)
        ended = token in ends
        text = "" if ended else self.text.add(token)
        finish = "stop" if ended or self.text.stopped else None
        if finish is None and len(self.job.tokens) >= self.job.new_tokens:
            finish = "length"
        text += self.text.end() if finish else ""
        return Event(text, "stop" if self.text.stopped else finish)


class Batch:
    """Rows and their cache."""

    def __init__(self, model: Any, cache: Any, row: Row):
        self.model, self.cache, self.rows = model, cache, [row]
        self._mask = torch.ones(1, row.seen, dtype=torch.long, device=model.device)

    def take_in(self, others: Sequence[Batch]) -> None:
        """The rows of others join; those are empty afterwards."""
        if not others:
            return
        caches.take_in(self.cache, [x.cache for x in others])
        masks = [self._mask, *(x._mask for x in others)]
        slots = max(m.shape[1] for m in masks)
        self._mask = torch.cat([pad(m, (slots - m.shape[1], 0)) for m in masks])
        self.rows += [row for x in others for row in x.rows]

    def step(self) -> Tensor:
        """Read the last token of every row; gives the next one of each."""
        last = torch.tensor([[r.job.tokens[-1]] for r in self.rows], device=self.model.device)
        places = torch.tensor([[r.seen] for r in self.rows], device=self.model.device)
        self._mask = pad(self._mask, (0, 1), value=1)
        out = self.model(last, attention_mask=self._mask, position_ids=places, **{CACHE: self.cache}, use_cache=True)
        for row in self.rows:
            row.seen += 1
        return next_tokens(out.logits, self.rows)

    def keep(self, rows: Sequence[Row]) -> None:
        """Only these go on."""
        if len(rows) == len(self.rows):
            return
        places = [i for i, row in enumerate(self.rows) if row in rows]
        self.rows = [self.rows[i] for i in places]
        if not places:
            caches.forget(self.cache)
            return
        self._mask = self._mask[places]
        padding = int(self._mask.argmax(-1).min())
        self._mask = self._mask[:, padding:]
        caches.keep_rows(self.cache, places, padding)


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """By each row's own wishes, from logits [b n v] of the last token."""
    return choose(logits[:, -1], [r.job.wish for r in rows], [r.draw() for r in rows])
