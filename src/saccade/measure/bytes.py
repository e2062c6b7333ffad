"""Bytes of caches, counted from their storages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attach import compat
from saccade.attach.compat import CACHE


def cache_bytes(cache: Any) -> int:
    """What a cache holds in all layers, with or without methods attached; a shared storage counts once."""
    held = sum(layer.bytes_held() for layer in cache.layers if hasattr(layer, "store"))
    plain = [layer for layer in cache.layers if not hasattr(layer, "store") and layer.is_initialized]
    return held + _storages([t for layer in plain for t in (layer.keys, layer.values)])


def _storages(tensors: list[Tensor]) -> int:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


@torch.no_grad()
def full_cache_bytes(model: Any, tokens: int, rows: int = 1) -> int:
    """Of the model's own cache after `tokens` tokens: a real one is filled and counted.

    The shapes come from a forward over one token, so sliding layers and odd heads are as the model has them.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    seed = model(ids, **{CACHE: compat.new_cache(model)}, use_cache=True)[CACHE]
    cache = compat.new_cache(model)
    for index, layer in enumerate(seed.layers):
        k, v = (t.new_zeros(rows, t.shape[1], tokens, t.shape[3]) for t in (layer.keys, layer.values))
        cache.update(k, v, index)
    return cache_bytes(cache)
