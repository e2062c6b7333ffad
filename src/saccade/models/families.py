"""Tiny random models of every family that attachment is tried on: a test's stand-in for the real thing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from saccade.core import rng
from saccade.core.errors import BadOption, UnknownName

VOCAB = 128
POSITIONS = 4096
# family -> model type of transformers
_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "gpt-neox": "gpt_neox",
}
FAMILIES: tuple[str, ...] = tuple(_TYPES)
_EVERY_LAYER = {"mistral", "phi3"}  # one window for all layers
_PER_LAYER = {"qwen2", "qwen3", "gemma2", "gemma3", "smollm3"}  # layer_types: sliding and full in turn


def tiny(
    family: str,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    head_size: int = 16,
    seed: int = 0,
    window: int | None = None,
) -> nn.Module:
    """A random causal language model of `family` with a vocabulary of 128, float32, in eval mode.

    The same arguments give the same weights in every process. Weights are drawn with deviation 1/sqrt(fan-in), so that
    attention is far from uniform. `kv_heads` is half of `heads` unless given (gpt-neox has no groups: all). `window`,
    in tokens, slides in every layer (mistral, phi3) or in every other one (qwen, gemma, smollm3); without it all see
    all.

    Raises:
        UnknownName: no such family.
        BadOption: head counts that do not divide, or a window or groups that the family does not have.
    """
    key = family.replace("_", "-")
    if key not in _TYPES:
        raise UnknownName("model family", family, FAMILIES, "See models.FAMILIES.")
    kv_heads = kv_heads or (heads if key == "gpt-neox" else max(1, heads // 2))
    _check(key, heads, kv_heads, window)
    shape = _shape(layers, heads, kv_heads, head_size)
    config = AutoConfig.for_model(_TYPES[key], **shape, **_extra(key, layers, head_size, window))
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator: leave the caller's alone
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, rng.generator("tiny", seed, key))
    return model.eval()


def _check(family: str, heads: int, kv_heads: int, window: int | None) -> None:
    if heads % kv_heads:
        raise BadOption(f"{heads} heads over {kv_heads} KV heads", "the second must divide the first")
    if family == "gpt-neox" and kv_heads != heads:
        asked = f"gpt-neox with {kv_heads} KV heads"
        raise BadOption(asked, "it has one per query head", f"Leave it out or say {heads}.")
    if window is not None and family not in _EVERY_LAYER | _PER_LAYER:
        others = ", ".join(sorted(_EVERY_LAYER | _PER_LAYER))
        raise BadOption(f"{family} with a window", "it has no sliding-window layers", f"These have: {others}.")


def _shape(layers: int, heads: int, kv_heads: int, head_size: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_size,
        "intermediate_size": 2 * heads * head_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def _extra(family: str, layers: int, head_size: int, window: int | None) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if family in _EVERY_LAYER:
        extra["sliding_window"] = window
    if family in _PER_LAYER:
        turns = ["sliding_attention", "full_attention"] if window else ["full_attention"]
        extra |= {"sliding_window": window, "layer_types": [turns[i % len(turns)] for i in range(layers)]}
    if family in {"qwen2", "qwen3", "smollm3"}:
        extra["use_sliding_window"] = window is not None
    if family in {"gemma2", "gemma3"}:
        extra["query_pre_attn_scalar"] = head_size
        extra["sliding_window"] = window or POSITIONS  # these prepare a window's mask even when no layer slides
    if family == "smollm3":
        extra["no_rope_layer_interval"] = 2  # the family's mark, and two layers must show it
    return extra


@torch.no_grad()
def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Matrices N(0, 1/fan-in), embeddings N(0, 1); norms and biases a tenth off what the family starts from."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise if id(parameter) in tables else noise / parameter.shape[-1] ** 0.5)
