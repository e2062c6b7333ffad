"""Seconds and bytes against length: all contestants side by side, in rounds, so that a slow minute hits them all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saccade.attach.compat import CACHE
from saccade.core.budget import Budget
from saccade.measure.bytes import cache_bytes
from saccade.measure.contestants import Contestant
from saccade.measure.score import Subject, clock

STEPS = 5  # tokens decoded one at a time
WARMUP_TOKENS, WARMUP_STEPS = 64, 2


def speed_round(
    subject: Subject, field: Sequence[tuple[Contestant, Budget]], ids: Int[Tensor, "1 n"], number: int, seed: int
) -> dict[str, Any]:
    """Time every contestant once on the same text; each round begins with another one.

    The measured part of a speed cell's line. What one of them raises is its own `error`.
    """
    start = number % len(field)
    measures = [_guarded(subject, who, budget, ids, seed) for who, budget in [*field[start:], *field[:start]]]
    return {"measures": sorted(measures, key=lambda m: (m["label"], m["budget"]))}


def _guarded(subject: Subject, who: Contestant, budget: Budget, ids: Tensor, seed: int) -> dict[str, Any]:
    entry = {"method": who.names, "label": who.label, "part": who.part, "budget": str(budget) if who.methods else "1"}
    try:
        return entry | _timed(subject, who, budget, ids, seed) | {"error": None}
    except Exception as e:  # one contestant's failure at one length is a result, and the others go on
        return entry | {"error": {"type": type(e).__name__, "text": str(e)}}


@torch.no_grad()
def _timed(subject: Subject, who: Contestant, budget: Budget, ids: Tensor, seed: int) -> dict[str, Any]:
    ids = ids.to(subject.device)
    prompt, rest = ids[:, :-STEPS], ids[:, -STEPS:]
    with who.working(subject.model, budget, seed, subject.found):
        warmup = clock(subject.device)
        _generate(subject, prompt[:, :WARMUP_TOKENS], rest[:, :WARMUP_STEPS])
        start = clock(subject.device)
        held, prefill, steps = _generate(subject, prompt, rest)
    times = {"warmup_seconds": start - warmup, "prefill_seconds": prefill, "decode_seconds": steps}
    return {"bytes_held": held, **{name: round(value, 6) for name, value in times.items()}}


def _generate(subject: Subject, prompt: Tensor, rest: Tensor) -> tuple[int, float, float]:
    """Bytes held after the prompt, its seconds, and seconds per further token (without sampling: the text is given)."""
    start = clock(subject.device)
    cache = subject.model(prompt, use_cache=True, logits_to_keep=1)[CACHE]
    prefill = clock(subject.device) - start
    held, start = cache_bytes(cache), time.perf_counter()
    for token in rest.split(1, dim=1):
        subject.model(token, **{CACHE: cache}, use_cache=True)
    return held, prefill, (clock(subject.device) - start) / rest.shape[1]
