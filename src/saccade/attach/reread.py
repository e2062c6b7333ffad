"""Read decoded tokens again, densely: what a sparse read left in the cache is then what a dense one leaves there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.attach import compat
from saccade.attach.layer import SaccadeLayer
from saccade.core.errors import CannotRun

if TYPE_CHECKING:
    from saccade.attach.run import Run

CHUNK_TOKENS = 512  # read again in one forward


def keep_up(run: Run, cache: Any, every: int, ids: Tensor | None, options: Mapping[str, Any]) -> None:
    """Before a forward of new tokens: read again what came after the prompt, if that are `every` tokens, and note the
    new ones. `options` are those of the forward.

    Raises:
        CannotRun: what would have to be read again cannot be noted, or not be taken back, with every reason.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, SaccadeLayer)]
    mask, places = options.get("attention_mask"), options.get("position_ids")
    reasons = _reasons(ids, mask, places, layers[0].prompt_done)
    if len(layers) < len(cache.layers):
        reasons.append("some layers keep a window only, which cannot take tokens back")
    if reasons:
        raise CannotRun(f"read tokens again every {every} under {run.title}", reasons, "Leave that option away.")
    first = layers[0]
    if ids is None or not first.prompt_done:
        return
    if first.since and first.since["input_ids"].shape[1] >= every:
        _read_again(run, cache, layers, mask)
    if places is None:  # what models take then
        places = torch.arange(first.seen, first.seen + ids.shape[1], device=ids.device)[None]
    old, new = first.since, {"input_ids": ids, "position_ids": places.expand_as(ids)}
    first.since = {name: torch.cat([old[name], x], 1) if old else x.clone() for name, x in new.items()}


def _reasons(ids: Tensor | None, mask: Any, places: Tensor | None, prompt_done: bool) -> list[str]:
    if not prompt_done:
        return []
    if ids is None:
        return ["this forward was given embeddings in place of token ids"]
    reasons = []
    if places is not None and places.dim() != 2:
        reasons.append(f"position_ids {tuple(places.shape)} are not [batch, tokens]")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -ids.shape[1] :].all()):
        reasons.append("there is padding among the tokens after the prompt")
    return reasons


def _read_again(run: Run, cache: Any, layers: Sequence[SaccadeLayer], mask: Any) -> None:
    """Take the noted tokens back and read them as if they went on with the prompt."""
    said = layers[0].since
    count = said["input_ids"].shape[1]
    for layer in layers:
        layer.crop(-count)
        layer.prompt_done = False
    slots = layers[0].seen
    with run.prompt(ends=False):  # what has ended at its end is not to end again, nor is another prompt to
        for start in range(0, count, CHUNK_TOKENS):
            part = {name: x[:, start : start + CHUNK_TOKENS] for name, x in said.items()}
            read = slots + start + part["input_ids"].shape[1]
            seen = None if mask is None else mask[:, :read]
            run.model.base_model(**part, attention_mask=seen, **{compat.CACHE: cache}, use_cache=True)
    for layer in layers:
        layer.prompt_done = True
    layers[0].since = {}
