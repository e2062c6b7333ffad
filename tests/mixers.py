"""What is checked of every layer that is trained, and a small one of the tests' own."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import rng
from saccade.core.card import Card
from saccade.core.method import Mixer, Slot
from saccade.methods.nets import Spec, make_mixer
from saccade.methods.nets._models import drawn
from tests.helpers import assert_within, error, rounding


class Fading(Mixer):
    """A running mean that forgets:  s_t = decay s_{t-1} + x_t,  y_t = W s_t."""

    card = Card(name="fading", title="Fading", family="mixers", paper="", year=2026, summary="A fading sum.")

    def __init__(self, slot: Slot, *, decay: float = 0.5):
        super().__init__(slot)
        self.decay = decay
        self.out = torch.nn.Linear(slot.channels, slot.channels)

    def forward(self, x, state=None, lengths=None):
        real = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        sums, carried = [], state["sum"] if state else x.new_zeros(len(x), x.shape[2])
        for t in range(x.shape[1]):
            new = self.decay * carried + x[:, t]
            carried = torch.where((t < real)[:, None], new, carried)
            sums.append(carried)
        return self.out(torch.stack(sums, 1)), {"sum": carried}

    def reference(self, x):
        n = x.shape[1]
        weights = torch.tensor([[self.decay ** (i - j) if j <= i else 0.0 for j in range(n)] for i in range(n)])
        return self.out(weights.to(x) @ x)


def made(spec: Spec, dtype: torch.dtype = torch.float64, **slot) -> torch.nn.Module:
    """A layer for a slot of 16 channels in 4 heads."""
    with drawn(0, "test"):
        return make_mixer(spec, Slot(16, 4, **slot)).to(dtype)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same tokens for the same shape."""
    return torch.randn(*shape, generator=rng.generator("mixers", 0, *shape), dtype=torch.float64).to(dtype)


def assert_as_good(actual: Tensor, wanted: Tensor, what: str) -> None:
    """Of two ways to compute the same in float64: apart by no more than float32 rounds."""
    wanted = wanted.detach()
    assert_within(actual, wanted, rounding(wanted, torch.float32), f"{what} ({error(actual, wanted):.3g})")
