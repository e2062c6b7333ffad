"""A service on the tiny model, and what its clients are told."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence

import torch

import saccade
from saccade.engines.serve.jobs import Event, Job, Wish
from saccade.engines.serve.service import Limits, Service
from saccade.measure.contestants import Spec, parse
from tests.measure import small

TEXT = "The whale swam past the ship, and nobody on the ship saw the whale at all. " * 5
BUDGET = "0.5"
PATIENCE_SECONDS = 60


def ids(length: int, start: int = 0) -> list[int]:
    """A prompt: token n is character n."""
    return [ord(c) for c in TEXT[start : start + length]]


def greedy(count: int) -> Wish:
    """So many tokens, the likeliest each."""
    return Wish(count, temperature=0.0)


def service(method: Spec = "full", model=None, budget: float | str = BUDGET, **limits) -> Service:
    budget = saccade.Budget.of(budget)
    return Service(model or small.model(), small.tokenizer(), parse(method), budget, Limits(**limits))


def alone(
    method: Spec, prompts: Sequence[list[int]], counts: Sequence[int], model=None, budget: float | str = BUDGET
) -> list[list[int]]:
    """What `generate` writes, one prompt at a time."""
    model = model or small.model()
    out = []
    with parse(method).working(model, saccade.Budget.of(budget), 0):
        for prompt, count in zip(prompts, counts):
            given = torch.tensor([prompt])
            mask = torch.ones_like(given)
            made = model.generate(given, attention_mask=mask, max_new_tokens=count, do_sample=False)
            out.append(made[0, len(prompt) :].tolist())
    return out


def until(true: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


class Client:
    """One request and what came of it."""

    def __init__(self, to: Service, prompt: list[int], wish: Wish, cancel_after: int | None = None):
        self.events: queue.Queue[Event] = queue.Queue()
        self.job = Job(prompt, wish, self._deliver)
        self.cancel_after, self.service = cancel_after, to
        to.submit(self.job)

    def _deliver(self, event: Event) -> None:
        self.events.put(event)
        if self.cancel_after is not None and len(self.job.tokens) >= self.cancel_after:
            self.service.cancel(self.job)

    def all(self) -> list[Event]:
        """Until the last."""
        told = []
        while not told or not told[-1].last:
            told.append(self.events.get(timeout=PATIENCE_SECONDS))
        return told

    def tokens(self) -> list[int]:
        """What it was given, once all of it is there."""
        error = self.all()[-1].error
        if error:
            raise error
        return self.job.tokens
