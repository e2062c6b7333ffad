"""From a name, a method or a factory to the layer that stands in a slot."""

from __future__ import annotations

from collections.abc import Callable

import torch

from saccade.core import registry
from saccade.core.method import Method, Mixer, Slot, configure, options, place
from saccade.methods.nets._attention import Attention

Spec = str | Method | Callable[[Slot], torch.nn.Module]


def make_mixer(spec: Spec, slot: Slot) -> torch.nn.Module:
    """The layer for a slot.

    spec: "NAME" or "NAME:OPTION=VALUE,..." of a registered mixer, or of a method whose selection an attention layer
        then uses; such a method itself; or a factory, which is given the slot. "random" selects while a text is read.

    Raises:
        UnknownName: nobody has a method of that name.
        BadOption: no such option, or a value it does not take.
        CannotRun: the method cannot be trained so, with every reason.
    """
    if isinstance(spec, Method):
        return Attention(slot, spec)
    if not isinstance(spec, str):
        return spec(slot)
    name, changes = registry.split(spec)
    kind = registry.get(name)
    if issubclass(kind, Mixer):
        return place(kind, slot, changes)
    if "part" in options(kind):
        changes = {"part": "prefill"} | changes
    return Attention(slot, configure(kind(), changes))
