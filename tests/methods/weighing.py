"""What a method that goes by the weights of every token holds before each of them: what its tests check against."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.attach import attach
from saccade.attach.calibration import Subject
from saccade.attach.compat import CACHE


def held_before(model, method, budget, ids: Tensor, prompt: int, layer: int = 0) -> list[list[Tensor]]:
    """Positions that each head of a layer holds before each token after the prompt, and in the end."""
    out = []
    with attach(model, method, budget=budget) as run, torch.no_grad():
        cache = model(ids[:, :prompt], use_cache=True)[CACHE]
        for token in ids[:, prompt:].split(1, 1):
            out.append(run.record.layer(layer).kept[0])
            model(token, **{CACHE: cache}, use_cache=True)
        return [*out, run.record.layer(layer).kept[0]]


def watched(model, method, budget, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """Queries and keys of the first layer, which no eviction changes, and what its heads hold."""
    _, q, k, _ = next(iter(Subject(model).capture_qkv([ids])))
    return q, k, held_before(model, method, budget, ids, prompt)


def kept_by(model, method, budget, ids: Tensor, prompt: int, layer: int) -> Tensor:
    """Mask [1 h n n] of a layer: a token after the prompt sees what is held before it, and itself."""
    n, heads = ids.shape[1], model.config.num_attention_heads
    out = torch.ones(1, heads, n, n, dtype=torch.bool)
    group = heads // model.config.num_key_value_heads
    for t, held in enumerate(held_before(model, method, budget, ids, prompt, layer)[:-1], prompt):
        for head in range(heads):
            out[:, head, t, :t] = torch.isin(torch.arange(t), held[head // group])
    return out
