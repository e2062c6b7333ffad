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
        return every(self.keys, q, count)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.keys]

    def moved(self, move: Callable[[Tensor], Tensor]) -> Flat:
        """With its keys elsewhere."""
        return Flat(move(self.keys))


def every(keys: Float[Tensor, "g n d"], q: Float[Tensor, "g s d"], count: int) -> Found:
    """The best of all keys."""
    product = wide(q.to(keys.device)) @ wide(keys).mT
    score, index = product.topk(min(count, keys.shape[1]), -1)
    return Found(index.int().to(q.device), score.to(q.device), product.numel())


def wide(x: Tensor) -> Tensor:
    """In float32 at least: what products are compared in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
