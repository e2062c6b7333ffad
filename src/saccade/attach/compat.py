"""Everything that depends on the version of transformers: its private names, and what we tested with."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from saccade.core.shard import WHOLE, Shard, uneven

OLDEST, NEWEST_TESTED = Version("5.17"), Version("5.24.99")
NAME = "saccade"  # a plain word: names with "flash", "sdpa" or a slash are treated specially by transformers

CACHES = ("past_key_values", "cache")  # what forwards, `generate` and outputs have called the cache
CACHE = CACHES[Version(transformers.__version__) >= Version("5.24.dev0")]  # and call it now

STEADY_ROPES = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on the text's length
BEFORE = "_saccade_before"  # of a config: the implementation that was there before us
OWN = ("sdpa", "eager")  # implementations that `own_attention` is bit for bit

_warned = False


def check_version() -> list[str]:
    """Reasons why this transformers cannot serve; an untested newer one warns once."""
    global _warned
    found = Version(transformers.__version__)
    if found < OLDEST:
        return [f"transformers is {found}; {OLDEST} or later is needed"]
    if found > NEWEST_TESTED and not _warned:
        _warned = True
        warnings.warn(
            f"saccade was tested with transformers {OLDEST} to {NEWEST_TESTED.major}.{NEWEST_TESTED.minor}, "
            f"this is {found}",
            stacklevel=3,
        )
    return []


def register(attention: Callable, mask: Callable) -> None:
    """Put our attention and mask functions under our name; doing it twice changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def can_switch(model: PreTrainedModel) -> list[str]:
    """Reasons why the attention of this model cannot be switched; every submodel is asked."""
    stiff = {
        type(m).__name__
        for m in model.modules()
        if isinstance(m, PreTrainedModel) and not m._can_set_attn_implementation()
    }
    return [f"{name} computes attention in its own code, not through transformers' interface" for name in sorted(stiff)]


def shard(model: PreTrainedModel) -> Shard:
    """Which heads of each layer are here, of a model that was loaded with `tp_plan`."""
    ranks = getattr(model, "_tp_size", None) or 1
    if ranks == 1:
        return WHOLE
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return Shard(mesh.get_local_rank(), ranks, mesh.get_group())


def device(model: PreTrainedModel) -> torch.device:
    """Where its token ids go; the CPU where the embedding lies on disk, from where its hooks take them on."""
    there = model.get_input_embeddings().weight.device
    return torch.device("cpu") if there.type == "meta" else there


def uneven_heads(model: PreTrainedModel) -> list[str]:
    """Why the processes that share this model cannot share its heads."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)
    return uneven(heads, getattr(config, "num_key_value_heads", None) or heads, getattr(model, "_tp_size", None) or 1)


def implementation(model: PreTrainedModel) -> str:
    """What computes the text part's attention."""
    return model.config.get_text_config(decoder=True)._attn_implementation


def switch(model: PreTrainedModel) -> Callable[[], None]:
    """Route the text part's attention to us; the returned function puts everything back."""
    text = model.config.get_text_config(decoder=True)
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is text), None)
    before = text._attn_implementation
    model.set_attn_implementation({key: NAME} if key else NAME)
    outermost = before != NAME
    if outermost:
        setattr(text, BEFORE, before)

    def restore() -> None:
        if outermost:
            delattr(text, BEFORE)
        model.set_attn_implementation({key: before} if key else before)

    return restore


def is_plain_layer(layer: object) -> bool:
    """True for the growing layer of full attention, the only kind of cache layer that we replace."""
    return type(layer) is DynamicLayer


def is_sliding_layer(layer: object) -> bool:
    """True for the layer that keeps the last tokens of a window."""
    return type(layer) is DynamicSlidingWindowLayer


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache that the model itself would make."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def is_growing_cache(cache: object) -> bool:
    """True for DynamicCache itself; static, quantised and offloaded caches hold other layers."""
    return type(cache) is DynamicCache and not cache.offloading


def is_plain_causal(mask_function: Callable) -> bool:
    """True if a mask is causal and no more: no packing, no bidirectional image tokens."""
    return mask_function is causal_mask_function


def dense_mask(**arguments: Any) -> torch.Tensor | None:
    """The boolean mask that transformers would have made; None means plain causal."""
    return sdpa_mask(**arguments)


def rotary_embeddings(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Those of a model, found once for all of its layers."""
    return [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]


def rotation(found: list[torch.nn.Module], module: torch.nn.Module, head_size: int) -> Callable | None:
    """(x [b h n d], positions [n]) -> x rotated as the model rotates queries there; None where that is not known: no
    rotary embedding or several, one that changes with the length of the text or takes other positions, or of a part of
    each head. `found`: the model's rotary embeddings.
    """
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if apply is None or list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"] or len(found) != 1:
        return None
    rotary = found[0]
    plain = list(inspect.signature(rotary.forward).parameters) == ["x", "position_ids"]
    plain = plain and getattr(rotary, "rope_type", None) in STEADY_ROPES and not hasattr(rotary, "mrope_section")
    if not plain or 2 * rotary.inv_freq.numel() != head_size:
        return None

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = (t / rotary.attention_scaling for t in rotary(x, positions[None]))
        return apply(x, x, cos, sin)[0]

    return rotate


def own_attention(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the module would have computed without us: SDPA, or its own eager code where it went by that or SDPA cannot
    do it.
    """
    eager = getattr(module.config, BEFORE, "sdpa") == "eager"
    if not eager and options.get("softcap") is None and options.get("s_aux") is None:
        return sdpa_attention_forward(module, q, k, v, mask, **options)
    if mask is None:
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward  # every modeling file has one
    return eager(module, q, k, v, mask, **options)
