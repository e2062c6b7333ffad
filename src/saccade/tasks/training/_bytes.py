"""Text as bytes: passages to train on from its beginning, and some from behind to judge by."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

from saccade.core import rng
from saccade.core.errors import BadOption
from saccade.tasks.training._base import Batch

PASSAGES = 64  # held out, spread evenly


def passages(text: Shaped[Tensor, " n"], starts: Tensor, tokens: int) -> Batch:
    """Rows of `tokens` bytes from these places, each with the byte behind it as target."""
    rows = text[starts[:, None] + torch.arange(tokens + 1)].long()
    return Batch(rows[:, :-1], rows[:, 1:])


def drawn(text: Tensor, tokens: int, step: int, rows: int, seed: int, name: str) -> Batch:
    """The passages of a step."""
    check(text, tokens, name)
    starts = torch.randint(0, len(text) - tokens, (rows,), generator=rng.generator(f"train/{name}", seed, step))
    return passages(text, starts, tokens)


def spread(text: Tensor, tokens: int, rows: int, name: str) -> list[Batch]:
    """The passages to judge by."""
    check(text, tokens, name)
    starts = torch.linspace(0, len(text) - tokens - 1, PASSAGES).long().unique()
    return [passages(text, some, tokens) for some in starts.split(rows)]


def check(text: Tensor, tokens: int, name: str) -> None:
    """That the text holds a passage.

    Raises:
        BadOption: it is too short.
    """
    if len(text) <= tokens:
        raise BadOption(f"{name} with {tokens} tokens", f"a part of the text has {len(text)}", "Ask for fewer.")
