"""MASFormer: a few layers see the whole text, the others their own block and the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.method import Sparse
from saccade.core.selection import Blocks, Gather, Selection, dense
from saccade.core.site import Site

TILE_TOKENS = 64  # blocks are whole tiles of this size, or a smaller power of two


@dataclass(frozen=True)
class Masformer(Sparse):
    """Full attention in l of L layers; in the others the text is cut into blocks of b and each looks back one block.

    Query t sees key j  iff  j <= t and floor(j / b) >= floor(t / b) - 1,  between b + 1 and 2 b keys. What is far away
    is brought together by the l layers, everything else is linear in the length.
    Nothing is learned besides the model's own weights, but the model is meant to be trained so: from scratch or on.
    The budget pays for the full layers first; 2 b is what it leaves to each row of the others.

    full_layers: l; fewer where they would take more than half of the whole model's budget
    placement: where they are: the first layers ("bottom"), the last ("top"), or spread out evenly ("even")

    Source: arXiv 2310.12442, section 3; no official code.
    """

    card = Card(
        name="masformer",
        title="Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer",
        family="sparse",
        paper="arXiv:2310.12442",
        year=2023,
        authors="Zhang, Ram, Hawkins, Zha, Zhao",
        summary="Full attention in a few layers, in the others only the own block and the one before.",
        equation="query t sees key j iff j <= t and floor(j/b) >= floor(t/b) - 1, or the layer is full",
        budget="pairs computed over all layers: the full layers are paid for by the others, whose blocks follow",
        departures=(
            "The block follows from the budget and the length; the paper fixes 1,024 tokens, and 4 or 8 full layers"
            " of 24.",
            "Blocks are whole tiles of 64 tokens, below that powers of two, so that the budget is not always spent.",
            "A budget in tokens holds for every row of every layer, so that then none is full.",
            "All keys stay stored; the paper's local layers could drop those of older blocks.",
            "The look-back blocks come without the paper's continued training on long texts; attached untrained to a"
            " pretrained model they lack the attention sink.",
        ),
        lacks={
            "chunks": "a fraction is taken of the tokens so far, and a first chunk does not know how many come; with"
            " a budget in tokens, chunks, steps and one pass agree exactly",
        },
    )

    full_layers: int = 4
    placement: Literal["bottom", "top", "even"] = "bottom"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "decode")

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        if site.offset == 0:
            row = self._row(site, site.keys)
            return dense(site.queries, site.keys) if row >= site.keys else _tiles(site, row, q.device)
        if site.budget.unit != "fraction":
            there, rows = [site.keys] * site.queries, [self._row(site, site.keys)] * site.queries
        else:  # one forward after a prompt reads what steps read: of so many tokens as there are by then
            there = list(range(site.offset + 1, site.keys + 1))
            rows = [self._row(site, n) for n in there]
        return _ranges(site, [row if row < n else None for row, n in zip(rows, there)], q.device)

    def _row(self, site: Site, tokens: int) -> int:
        """Keys that a row of this layer may read among so many, so that all layers stay within the budget."""
        full = self._full(site, tokens)
        if site.layer in full:
            return tokens
        if site.budget.unit != "fraction":
            return site.budget.tokens(tokens)
        left = (site.budget.amount * site.layers - len(full)) / (site.layers - len(full))
        return Budget(left).row_tokens(tokens)

    def _full(self, site: Site, tokens: int) -> set[int]:
        """Which layers are full."""
        share = site.budget.amount if site.budget.unit == "fraction" else 0.0
        least = 2 / (tokens + 1)  # of all pairs: a row's own key, which is in every layer
        paid = site.layers * min(share / 2, (share - least) / (1 - least + 1e-9))  # the second: of few tokens
        count = max(0, min(self.full_layers, int(paid)))
        if self.placement == "even":
            return {i * site.layers // count for i in range(count)}
        first = 0 if self.placement == "bottom" else site.layers - count
        return set(range(first, first + count))


def _block(row: int) -> int:
    """The largest block of which two are no more than a row may read."""
    half = max(1, row // 2)
    return half // TILE_TOKENS * TILE_TOKENS if half >= TILE_TOKENS else 1 << (half.bit_length() - 1)


def _back(row: int) -> int:
    """Blocks before the own one: none where a row reads one key, which is the token itself."""
    return int(row > 1)


def _tiles(site: Site, row: int, device: torch.device) -> Blocks:
    """From the first token on, as whole tiles."""
    block = _block(row)
    tile = min(block, TILE_TOKENS)
    at = torch.arange(-(-site.keys // tile), device=device) * tile
    keep = (at[None] <= at[:, None]) & (at[None] // block >= at[:, None] // block - _back(row))
    shape = {"queries": site.queries, "keys": site.keys, "q_block": tile, "k_block": tile}
    return Blocks.of(keep[None, None], **shape)


def _ranges(site: Site, rows: list[int | None], device: torch.device) -> Selection:
    """For later tokens, one range of keys each; None: all before it."""
    if not any(rows):
        return dense(site.queries, site.keys)
    at = range(site.offset, site.keys)
    first = [max(0, (t // _block(row) - _back(row)) * _block(row)) if row else 0 for t, row in zip(at, rows)]
    ranges = torch.tensor([[start, t + 1] for start, t in zip(first, at)], dtype=torch.int32, device=device)
    none = torch.full((1, 1, site.queries, 0), -1, dtype=torch.int32, device=device)
    return Gather(index=none, ranges=ranges[None, None, :, None], queries=site.queries, keys=site.keys)
