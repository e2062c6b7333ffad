"""Listeners: for a while, every attention module's tensors go through a function of ours, and nothing is stored."""

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


@contextlib.contextmanager
def listening(model: Any, found: Found, make: Callable[[Spot], Listener]) -> Iterator[None]:
    """Route every full-attention module through its own listener, and put everything back."""
    restore = compat.switch(model)
    try:
        for spot in found.sites:
            spot.module._saccade = make(spot)
        yield
    finally:
        for spot in found.sites:
            spot.module.__dict__.pop("_saccade", None)
        restore()
