"""Caches of prompts that were read, kept for prompts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from saccade.attach import caches
from saccade.measure.bytes import cache_bytes


class Prefixes:
    """The last few, the one used longest ago leaves first. `observed_tokens` of a prompt are always read anew."""

    def __init__(self, most: int, observed_tokens: int):
        self.most, self.observed_tokens = most, observed_tokens
        self.hits, self.reused_tokens = 0, 0
        self._kept: OrderedDict[int, tuple[Tensor, Any, int]] = OrderedDict()  # ids, cache, bytes
        self._count = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes_held(self) -> int:
        """Of all of them; what two share counts twice."""
        return sum(size for _, _, size in self._kept.values())

    def find(self, ids: list[int]) -> tuple[Any, int]:
        """A cache to go on with and how many tokens it holds; (None, 0) if nothing begins alike."""
        wanted = torch.tensor(ids)
        longest, key = max(((_alike(wanted, kept), k) for k, (kept, _, _) in self._kept.items()), default=(0, 0))
        tokens = min(longest, len(ids) - self.observed_tokens)
        if tokens < 1:
            return None, 0
        self._kept.move_to_end(key)
        self.hits, self.reused_tokens = self.hits + 1, self.reused_tokens + tokens
        return caches.beginning(self._kept[key][1], tokens), tokens

    def keep(self, ids: list[int], cache: Any, most_bytes: int) -> None:
        """Remember a prompt that was read, whose end methods have not met; others leave until it fits."""
        wanted, mine = torch.tensor(ids), caches.beginning(cache, len(ids))
        size = cache_bytes(mine)
        for key, (kept, _, _) in list(self._kept.items()):
            if _alike(wanted, kept) == len(kept):  # all of it is in the new one
                del self._kept[key]
        if self.most < 1 or size > most_bytes:
            return
        self.shrink(most_bytes - size, self.most - 1)
        self._count += 1
        self._kept[self._count] = wanted, mine, size

    def shrink(self, most_bytes: int, most: int | None = None) -> None:
        """Let the oldest go until the rest fits."""
        while self._kept and (self.bytes_held > most_bytes or len(self._kept) > (self.most if most is None else most)):
            self._kept.popitem(last=False)


def _alike(a: Tensor, b: Tensor) -> int:
    """Tokens at the beginning that are the same."""
    n = min(len(a), len(b))
    differs = (a[:n] != b[:n]).nonzero()
    return int(differs[0]) if len(differs) else n
