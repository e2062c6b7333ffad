"""Every key is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.ops.nearest.api import Found


@dataclass(frozen=True)
class Flat:
    """No index: the exact answer."""

    keys: Float[Tensor, "g n d"]

    def search(self, q: Float[Tensor, "g s d"], count: int) -> Found:
        """The keys of the largest products."""
        score = wide(q) @ wide(self.keys).mT
        found = score.topk(min(count, self.keys.shape[1]), -1).indices
        return Found(found.int(), score.numel())

    def moved(self, move: Callable[[Tensor], Tensor]) -> Flat:
        """With its keys elsewhere."""
        return Flat(move(self.keys))


def everything(keys: Float[Tensor, "g n d"], queries: int) -> Found:
    """All keys, for a search that wants as many as there are."""
    g, n, _ = keys.shape
    return Found(torch.arange(n, dtype=torch.int32, device=keys.device).expand(g, queries, n), g * queries * n)


def wide(x: Tensor) -> Tensor:
    """In float32 at least: what products are compared in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
