"""Heads taken out of a model for a while, to see what depends on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saccade.attach.listening import looking_on
from saccade.attach.probe import Spot, probe
from saccade.core.errors import BadOption, CannotRun

Mode = Literal["uniform", "zero"]


@contextlib.contextmanager
def without_heads(model: Any, heads: Sequence[tuple[int, int]], mode: Mode = "uniform") -> Iterator[None]:
    """As long as the block lasts, these heads, (layer, head), look at nothing; the model's own cache does for it.

    mode: "uniform": they attend to all tokens alike, their output is the mean of the values; "zero": their output is 0

        first = model(ids[:, :-1], use_cache=True)              # the prompt is read with all heads
        with without_heads(model, [(18, 6), (20, 6)]):          # what follows without these
            model.generate(ids, past_key_values=first.past_key_values)   # from transformers 5.24 on: cache=first.cache

    Raises:
        BadOption: no such mode, or a head that the model does not have.
        CannotRun: the model is not served, or something is attached to it.
    """
    found, busy = probe(model), getattr(model, "_saccade_run", None)
    reasons = found.reasons + ([] if busy is None else [f"{busy.title} is attached; detach it first"])
    if reasons:
        raise CannotRun(f"take heads out of {type(model).__name__}", reasons, "See also: saccade explain")
    if mode not in get_args(Mode):
        raise BadOption(f"mode={mode!r}", "it takes 'uniform' or 'zero'", "Give one of these.")
    layers, width = found.sites[0].place.layers, found.sites[0].place.heads
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < width):
            raise BadOption(f"head {head} of layer {layer}", f"there are {layers} layers of {width}", "Count from 0.")
    gone = {layer: sorted({h for at, h in heads if at == layer}) for layer, _ in heads}
    with looking_on(model, found, lambda spot: _Ablator(spot, gone.get(spot.place.layer, []), mode)):
        model._saccade_run = _Ablator.run  # nothing else is attached meanwhile
        try:
            yield
        finally:
            del model._saccade_run


class _Ablator:
    """One module without some of its heads."""

    run = SimpleNamespace(title="without_heads")

    def __init__(self, spot: Spot, heads: list[int], mode: Mode):
        self.place, self.heads, self.mode = spot.place, heads, mode

    def after(
        self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, out: Float[Tensor, "b q h d"]
    ) -> Float[Tensor, "b q h d"]:
        if not self.heads:
            return out
        out = out.clone()
        if self.mode == "zero":
            out[:, :, self.heads] = 0
            return out
        group = self.place.heads // self.place.kv_heads
        mean = so_far(v[:, [head // group for head in self.heads]], q.shape[2], real)
        out[:, :, self.heads] = mean.transpose(1, 2).to(out.dtype)
        return out


def so_far(
    v: Float[Tensor, "b h k d"], queries: int, real: Bool[Tensor, "b k"] | None
) -> Float[Tensor, "b h q d"]:
    """Mean of the values of the real tokens up to each of the last `queries`, in float32 or better."""
    kind = torch.promote_types(v.dtype, torch.float32)
    there = torch.ones_like(v[:, :1, :, :1], dtype=kind) if real is None else real[:, None, :, None].to(kind)
    total, count = ((x * there).cumsum(2)[:, :, -queries:] for x in (v.to(kind), torch.ones_like(there)))
    return total / count.clamp(min=1)
