"""The two functions that transformers calls under our name: attention and mask."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from saccade.attach import compat
from saccade.attach.layer import SaccadeLayer
from saccade.attach.masks import LazyMask
from saccade.core.errors import CannotRun

# while a probe forward runs: what was seen, one entry per call
PROBED: ContextVar[list[dict[str, Any]] | None] = ContextVar("saccade_probed", default=None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Per module: to its engine if it has one, else to what the model would have computed without us, which an onlooker
    may then see and edit.
    """
    layer: SaccadeLayer | None = getattr(key, "_saccade_layer", None)
    probed = PROBED.get()
    if probed is not None:
        probed.append({"module": module, "q": query, "k": key, "layer": layer, "scaling": scaling, "kwargs": kwargs})
    engine, onlooker = getattr(module, "_saccade", None), getattr(module, "_saccade_beside", None)
    if engine is None or (layer is None and kwargs.get("sliding_window") is not None):
        mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        out, weights = compat.own_attention(module, query, key, value, mask, **options)
        if onlooker is not None and probed is None:
            _refuse(onlooker, attention_mask, dropout, kwargs)
            real = attention_mask.real_keys(key.shape[2]) if isinstance(attention_mask, LazyMask) else None
            out = onlooker.after(layer, query, key, value, real, out)
        return out, weights
    _refuse(engine, attention_mask, dropout, kwargs)
    real = attention_mask.real_tokens(query.shape[2]) if isinstance(attention_mask, LazyMask) else None
    out = engine.forward(layer, query, key, value, real)
    return out.transpose(1, 2).contiguous(), None


def _refuse(engine: Any, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    reasons = []
    if mask is not None and not isinstance(mask, LazyMask):
        reasons.append(
            f"it was given a mask of its own, {tuple(mask.shape)}; only padding masks [batch, tokens] are read"
        )
    elif mask is not None and not mask.plain:
        reasons.append("its mask is more than causal and padding (packed sequences, or tokens that see each other)")
    if dropout:
        reasons.append(f"attention dropout is {dropout}; call model.eval()")
    if kwargs.get("output_attentions"):
        reasons.append("output_attentions=True asks for the map that is not computed")
    if reasons:
        raise CannotRun(f"run this model under {engine.run.title}", reasons, "")


def install() -> None:
    """Register both functions with transformers."""
    compat.register(attention, LazyMask.make)
