"""Listeners: for a while, every attention module's tensors go through a function of ours, and nothing is stored.

Onlookers: the module computes as ever, and a function of ours is shown what came of it, and may give back another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from saccade.attach import compat
from saccade.attach.probe import Found, Spot


class Listener(Protocol):
    """Stands in for an engine in one attention module while calibrating."""

    run: Any  # only its `title` is read, by error texts

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """Attention output [b h q d] of the module's tensors."""
        ...


class Onlooker(Protocol):
    """Beside the model's own attention in one module. It works on the model's own cache."""

    run: Any  # only its `title` is read, by error texts

    def after(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, out: Tensor) -> Tensor:
        """The module's output [b q h d], as it came or edited.

        k, v: of all tokens, those read before among them; real: which of these are no padding [b k], None: all
        """
        ...


@contextlib.contextmanager
def listening(model: Any, found: Found, make: Callable[[Spot], Listener]) -> Iterator[None]:
    """Route every full-attention module through its own listener, and put everything back."""
    with _placed(model, found, "_saccade", make):
        yield


@contextlib.contextmanager
def looking_on(model: Any, found: Found, make: Callable[[Spot], Onlooker]) -> Iterator[None]:
    """Put an onlooker beside every full-attention module, and take them away again."""
    with _placed(model, found, "_saccade_beside", make):
        yield


@contextlib.contextmanager
def _placed(model: Any, found: Found, name: str, make: Callable[[Spot], Any]) -> Iterator[None]:
    restore = compat.switch(model)
    try:
        for spot in found.sites:
            setattr(spot.module, name, make(spot))
        yield
    finally:
        for spot in found.sites:
            spot.module.__dict__.pop(name, None)
        restore()
