"""A LLaVA-style model with a tiny random vision tower: what methods for images are tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from saccade.core import rng
from saccade.models.families import fill, tiny

CHANNELS = 32  # of the vision tower


def tiny_llava(
    language: Any = None, *, image_token: int | None = None, image_pixels: int = 48, patch_pixels: int = 8,
    seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A random vision tower of two layers and a projector, before a causal language model of the Llama type.

    It takes `input_ids` and `pixel_values` [images 3 image_pixels image_pixels]; of each image (image_pixels /
    patch_pixels)^2 tokens stand in the text as `image_token`. The same arguments give the same weights.

    language: the language part, which is shared, not copied; None: `tiny("llama")`
    image_token: an id of its vocabulary; None: the last one
    """
    language = tiny("llama", seed=seed) if language is None else language
    text = language.config
    vision = {
        "model_type": "clip_vision_model", "hidden_size": CHANNELS, "intermediate_size": 2 * CHANNELS,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": image_pixels, "patch_size": patch_pixels,
        "projection_dim": CHANNELS,
    }  # fmt: skip
    blank = {**text.to_dict(), "num_hidden_layers": 0, "layer_types": []}  # its weights are the language's
    token = text.vocab_size - 1 if image_token is None else image_token
    config = AutoConfig.for_model("llava", text_config=blank, vision_config=vision, image_token_index=token)
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator: leave the caller's alone
        torch.manual_seed(rng.seed_of("tiny-llava", seed))  # of what `fill` adds to
        model = AutoModelForImageTextToText.from_config(config, dtype=language.dtype)
    for i, part in enumerate((model.model.vision_tower, model.model.multi_modal_projector)):
        fill(part, rng.generator("tiny-llava", seed, i))
    model.config.text_config = text
    model.model.language_model, model.lm_head = language.model, language.lm_head
    model.generation_config = language.generation_config
    return model.eval()
