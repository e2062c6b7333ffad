"""The next token of every row, each with its own temperature, top-p and stream of random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.engines.serve.jobs import Wish


def choose(logits: Float[Tensor, "b v"], wishes: Sequence[Wish], draws: Sequence[float]) -> Int[Tensor, " b"]:
    """Temperature 0: the likeliest. Else the token where the cumulated probability passes `draws`, numbers in [0, 1).

    Only the likeliest tokens that together reach top_p count.
    """
    best = logits.argmax(-1)
    if not any(w.temperature for w in wishes):
        return best
    temperature, top_p, draw = (
        torch.tensor(x, dtype=torch.float32, device=logits.device)[:, None]
        for x in ([w.temperature or 1.0 for w in wishes], [w.top_p for w in wishes], draws)
    )
    ordered, index = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    p = ordered.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    passed = p.cumsum(-1)
    place = (passed <= draw * passed[:, -1:]).sum(-1, keepdim=True).clamp(max=(p > 0).sum(-1, keepdim=True) - 1)
    drawn = index.gather(-1, place.clamp(min=0))[:, 0]
    return torch.where(torch.tensor([w.temperature == 0 for w in wishes], device=logits.device), best, drawn)
