"""Which heads of a layer this process has, where several processes share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `ranks` equal parts of the heads, in order: of the query heads and of the key/value heads alike.

    This is the one place where what there is per head is cut up: a method that knows something of every head of the
    model takes its part with `mine`; one whose heads compete, or agree, looks at all of them through `gather`. All
    processes must come to it with tensors of the same shape.
    """

    rank: int = 0
    ranks: int = 1
    group: Any = None  # of torch.distributed

    def mine(self, x: Tensor, dim: int = 0) -> Tensor:
        """Of what lies along `dim` for all heads, that of the heads here."""
        return x if self.ranks == 1 else x.chunk(self.ranks, dim)[self.rank]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """What all processes have for their heads, behind one another along `dim`. Without gradients."""
        if self.ranks == 1:
            return x
        there = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        torch.distributed.all_gather(there, x.detach().contiguous(), group=self.group)
        return torch.cat(there, dim)


WHOLE = Shard()


def uneven(heads: int, kv_heads: int, ranks: int) -> list[str]:
    """Why so many processes cannot share the heads of a layer; [] if they can."""
    counts = (("query heads", heads), ("key/value heads", kv_heads))
    return [f"{n} {what} cannot be shared out evenly among {ranks} processes" for what, n in counts if n % ranks]
