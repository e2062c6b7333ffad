"""Random selection: the same budget, spent blindly. What every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core import rng
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.selection import Blocks, Gather, Selection
from saccade.core.site import Seen, Site


@dataclass(frozen=True)
class Random(Cache):
    """Spend the budget on keys drawn uniformly, without looking at them.

    part: which work it does: "evict" remembers random keys of the prompt, "prefill" computes random blocks of keys for
        each block of queries, "decode" reads random keys for each new query. The newest key, or the diagonal block, is
        always among them, so that no query sees nothing.
    block_tokens: of "prefill"; a smaller power of two where four of them exceed the keys that a row may read

    It is a `Cache` for all three parts: the engine asks a cache method's `score` when it owns "evict", and its `select`
    when it owns "prefill" or "decode". Key/value heads draw for themselves; their query heads share in "evict".
    """

    card = Card(
        name="random",
        title="Random selection",
        family="sparse",
        paper="",
        year=2017,
        summary="The same budget on keys drawn at random: evicted, computed in the prefill, or read in decoding.",
        budget="keys per head that remain (evict), pairs computed (prefill), keys each new query reads (decode)",
        baseline=True,
        lacks={
            "chunks": "what is drawn at the end of a prompt, or for its blocks, depends on where the prompt ends",
            "gqa": "in a cache each key/value head draws for itself, so heads written out draw differently",
        },
    )

    part: Literal["evict", "prefill", "decode"] = "evict"
    block_tokens: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.block_tokens < 1:
            raise BadOption("random.block_tokens=0", "it takes at least 1", "Leave it away for 64.")

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.part,)

    def check(self, site: Site) -> list[str]:
        if self.part == "evict" or site.budget.unit != "bytes":
            return []
        return [
            f"part={self.part!r} leaves out pairs, not memory, and the budget {site.budget} is in bytes; "
            f"give a fraction or tokens"
        ]

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        b, g, k, _ = seen.keys.shape
        draw = _draw(site, "evict", site.all_kv_heads, k)
        draw[:, -1:] = torch.inf
        return draw.expand(b, g, k).to(seen.keys.device)

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        return self._blocks(site, q.device) if self.part == "prefill" else _keys(site, q.device)

    def _blocks(self, site: Site, device: torch.device) -> Blocks:
        """For each query block its diagonal, and as many earlier key blocks as the budget pays for."""
        row = site.budget.row_tokens(site.keys)
        block = min(self.block_tokens, 1 << max(0, (row // 4).bit_length() - 1))
        first = torch.arange(0, site.queries, block) + site.offset
        last = (first + block).clamp(max=site.keys) - 1
        start = torch.arange(0, site.keys, block)
        draw = _draw(site, "prefill", site.all_heads, len(first), len(start))
        draw.masked_fill_((start + block > first[:, None]) & (start <= last[:, None]), 2.0)
        draw.masked_fill_(start > last[:, None], -1.0)
        count = last // block - first // block + 1 + _affordable(first, last, row, block)
        rank = draw.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        keep = (rank < count[:, None]) & (draw >= 0)
        shape = {"queries": site.queries, "keys": site.keys, "q_block": block, "k_block": block}
        return Blocks.of(keep[None].to(device), **shape)


def _affordable(first: Int[Tensor, " n"], last: Int[Tensor, " n"], row: int, block: int) -> Int[Tensor, " n"]:
    """Key blocks, beside the diagonal, of each block of queries, if a query may read `row` keys.

    What is left of a key block is carried on to the next queries, so that the budget is spent.
    """
    position = torch.arange(int(first[0]), int(last[-1]) + 1)
    mine = (position - first[0]) // block
    diagonal = first // block * block
    spare = (position + 1).clamp(max=row) - (position + 1 - diagonal[mine])
    blocks = torch.zeros(len(first), dtype=torch.float64).index_add_(0, mine, spare.double())
    whole = (blocks / (block * (last - first + 1))).cumsum(0).add(1e-6).floor().long()
    return whole.diff(prepend=whole.new_zeros(1))


def _keys(site: Site, device: torch.device) -> Gather:
    """For each query itself and random earlier keys, drawn by its true position: the same in one forward or in many."""
    index = torch.full((1, site.heads, site.queries, site.budget.tokens(site.keys)), -1, dtype=torch.int32)
    for i in range(site.queries):
        there = site.offset + i + 1
        count = site.budget.tokens(there)
        draw = _draw(site, "decode", site.all_heads, there, at=site.seen - site.queries + i)
        draw[:, -1] = 2.0
        index[0, :, i, :count] = draw.topk(count, -1).indices.int()
    return Gather(index=index.to(device), queries=site.queries, keys=site.keys)


def _draw(site: Site, what: str, *shape: int, at: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) for this seed, layer and query position; of all heads, those here are given back."""
    draw = torch.rand(shape, generator=rng.generator(f"random/{what}", site.seed, site.layer, at))
    return site.shard.mine(draw)
