"""Keys and values as they lie in vLLM's blocks, and what methods store beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Pages:
    """Columns of one layer: of each token and key/value head a row [g ...], found by its slot.

    Slot s is place s % S of block s // S, for blocks of S tokens. What methods store beside the keys lies in tensors of
    ours, of as many blocks.
    """

    def __init__(self, kv_cache: Float[Tensor, "blocks g S d2"]):
        size = kv_cache.shape[-1] // 2
        self.columns = {"keys": kv_cache[..., :size], "values": kv_cache[..., size:]}
        self.blocks, self.kv_heads, self.block_tokens, _ = kv_cache.shape
        self.of = kv_cache.data_ptr()

    def write(self, slots: Int[Tensor, " n"], columns: Mapping[str, Float[Tensor, "n g ..."]]) -> None:
        """New tokens, at their slots."""
        block, place = slots // self.block_tokens, slots % self.block_tokens
        for name, new in columns.items():
            if name not in self.columns:
                shape = (self.blocks, self.kv_heads, self.block_tokens, *new.shape[2:])
                self.columns[name] = new.new_zeros(shape)
            self.columns[name][block, :, place] = new

    def read(self, name: str, slots: Int[Tensor, "b a n"]) -> Tensor:
        """[b a n ...]: of each head, one for every key/value head or several, the rows at its own slots."""
        heads = torch.arange(slots.shape[1], device=slots.device)
        head = (heads // (slots.shape[1] // self.kv_heads))[:, None]
        return self.columns[name][slots // self.block_tokens, head, slots % self.block_tokens]

    def slots(self, table: Int[Tensor, " blocks"], positions: Int[Tensor, "*a"]) -> Int[Tensor, "*a"]:
        """Where the tokens at these positions of a request lie."""
        block = positions // self.block_tokens
        return table[block].long() * self.block_tokens + positions % self.block_tokens


class Stored(Mapping[str, Tensor]):
    """What a method may look at of one request, [1 g n ...], read from the blocks when it does."""

    def __init__(self, pages: Pages, table: Int[Tensor, " blocks"], tokens: int):
        self.pages, self.table, self.tokens = pages, table, tokens
        self.names = [*pages.columns, "positions"]

    def __getitem__(self, name: str) -> Tensor:
        at = torch.arange(self.tokens, device=self.table.device).expand(1, self.pages.kv_heads, -1)
        if name == "positions":
            return at
        return self.pages.read(name, self.pages.slots(self.table, at))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
