"""The places of the best scores in plain torch."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def topk(scores: Float[Tensor, "*rows n"], keep: int) -> Int[Tensor, "*rows k"]:
    """By torch.topk; of equal scores at the edge, any."""
    return _ascending(*scores.topk(keep, -1, sorted=False), scores.shape[-1])


def stable(scores: Float[Tensor, "*rows n"], keep: int) -> Int[Tensor, "*rows k"]:
    """By a stable sort; of equal scores at the edge, the first."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return _ascending(values[..., :keep], places[..., :keep], scores.shape[-1])


def _ascending(values: Tensor, places: Tensor, n: int) -> Tensor:
    places = places.masked_fill(values == -float("inf"), n).sort(-1).values.int()
    return places.masked_fill(places == n, -1)
