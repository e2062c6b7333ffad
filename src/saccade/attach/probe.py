"""One small forward that finds out where our functions are reached, and whether everything they need arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.attach import compat
from saccade.attach.compat import CACHE
from saccade.attach.engine import Place
from saccade.attach.interface import PROBED, install
from saccade.attach.layer import SaccadeLayer
from saccade.core.shard import WHOLE, Shard
from saccade.core.site import Turn


@dataclass(frozen=True)
class Spot:
    """An attention module that a method can work in."""

    module: nn.Module
    place: Place


@dataclass(frozen=True)
class Found:
    """What the probe saw: the modules of full attention, and every reason why the model cannot be served."""

    sites: list[Spot]
    reasons: list[str]
    bytes_per_token: int = 0  # of the heads of all processes
    shard: Shard = WHOLE  # which heads of each layer are here
    sharing: Any = None  # how processes share its texts


def probe(model: Any) -> Found:
    """Run two tokens through the model with our functions and cache layers, and look at what arrived."""
    reasons = compat.check_version()
    if not hasattr(model, "config"):
        return Found([], [*reasons, f"{type(model).__name__} is not a model of transformers"])
    if getattr(model.config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder; decoder-only models are served so far")
    reasons += compat.can_switch(model) + compat.uneven_heads(model)
    if reasons:
        return Found([], reasons)
    calls = _forward(model)
    served, reasons = _judge(calls)
    layers, rotary = len(served), compat.rotary_embeddings(model)
    spots = [Spot(call["module"], _place(i, layers, call, _turn(rotary, call))) for i, call in enumerate(served)]
    size = sum(2 * call["k"].shape[1] * call["k"].shape[3] * call["k"].element_size() for call in served)
    shard = compat.shard(model)
    return Found(spots, reasons, size * shard.ranks, shard)


def _forward(model: Any) -> list[dict[str, Any]]:
    install()
    calls: list[dict[str, Any]] = []
    restore = compat.switch(model)
    token = PROBED.set(calls)
    training = model.training
    try:
        model.eval()
        cache = compat.new_cache(model)
        cache.layers = [
            SaccadeLayer(i, None) if compat.is_plain_layer(layer) else layer for i, layer in enumerate(cache.layers)
        ]
        with torch.no_grad():
            table = model.get_input_embeddings().weight
            word = table.shape[0] // 2  # an ordinary one: specials may be zero
            ids = torch.full((1, 2), word, device=compat.device(model))
            model(input_ids=ids, **{CACHE: cache}, use_cache=True)
    finally:
        model.train(training)
        PROBED.reset(token)
        restore()
    return calls


def _judge(calls: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Calls of full attention over our own cache layers, and reasons against the model."""
    served = [c for c in calls if c["layer"] is not None and c["module"].layer_idx == c["layer"].index]
    reasons = []
    if not calls:
        reasons.append("its attention layers never called the registered function")
    elif not served and any(c["kwargs"].get("sliding_window") for c in calls):
        reasons.append("every layer has a sliding window, so there is no full attention to work in")
    elif not served:
        reasons.append(
            "keys are changed between the cache and the attention (latent attention?), so nothing can be kept apart"
        )
    if any(c["kwargs"].get("s_aux") is not None for c in served):
        reasons.append("its softmax has a learned sink logit (s_aux), which the ops do not compute yet")
    if len({c["module"] for c in served}) < len(served):
        reasons.append("a layer called its attention more than once in one forward")
    return served, reasons


def _turn(rotary: list[nn.Module], call: dict[str, Any]) -> Turn | None:
    """How queries of this layer move along the text, if we know: it must take the probe's first query to its second.

    The two tokens are the same and so is all that they see, so that nothing but the position tells their queries apart.
    """
    q, module = call["q"].detach(), call["module"]
    first, second = q[:, :, :1], q[:, :, 1:]
    one = torch.ones(1, dtype=torch.long, device=q.device)
    # half of the digits, since rounding grows with the layers; norms and sines are taken in float32 in any model
    eps = max(torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps)
    bound = eps**0.5 * float(q.abs().max())
    for turn in (_stay, compat.rotation(rotary, module, q.shape[-1])):
        if bound and turn is not None and float((turn(first, one) - second).abs().max()) <= bound:
            return turn
    return None


def _stay(x: Tensor, shifts: Tensor) -> Tensor:
    """Of layers without positions."""
    return x


def _place(index: int, layers: int, call: dict[str, Any], turn: Turn | None) -> Place:
    q, k = call["q"], call["k"]
    scale = call["scaling"] if call["scaling"] is not None else q.shape[-1] ** -0.5
    return Place(index, layers, q.shape[1], k.shape[1], q.shape[3], scale, call["kwargs"].get("softcap"), turn)
