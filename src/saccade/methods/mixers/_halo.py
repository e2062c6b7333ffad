"""Attention of blocks over themselves and a halo, with relative positions: on a line, or on a map of two axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.errors import BadOption
from saccade.core.selection import Gather
from saccade.methods.mixers._windows import crossed


@dataclass(frozen=True)
class Halo:
    """Blocks of `block` cells along each axis; all queries of one see w = block + 2 halo cells, those of the map.

    `stride`: only every so-manieth query of a block, so that the map that comes out is smaller.
    `mask_pad`: no cell beyond the border is seen; False: zeros lie there, seen as keys and values. `causal`: of a line.

    Raises:
        BadOption: sizes that make no blocks.
    """

    sides: tuple[int, ...]
    block: int
    halo: int
    stride: int = 1
    mask_pad: bool = True
    causal: bool = False

    def __post_init__(self):
        asked = f"blocks of {self.block} cells with a halo of {self.halo} and a stride of {self.stride}"
        if self.block < 1 or self.halo < 0 or self.stride < 1:
            raise BadOption(asked, "the halo may be 0, the others are 1 or more", "Give such sizes.")
        if self.block % self.stride:
            raise BadOption(asked, "queries of a block would not be evenly apart", "Give a stride that divides it.")
        if self.causal and not self.mask_pad:
            raise BadOption(asked, "zeros behind a text would come before its later tokens", "Leave mask_pad as it is.")

    @property
    def window(self) -> int:
        """w."""
        return self.block + 2 * self.halo

    @property
    def out_sides(self) -> tuple[int, ...]:
        """Of the map that comes out."""
        return tuple(-(-n // self.stride) for n in self.sides)

    def first(self, cells: int) -> Int[Tensor, " blocks"]:
        """First cell of each block of an axis."""
        return torch.arange(0, cells, self.block)

    def queries(self) -> Int[Tensor, "blocks q"]:
        """Queries of each block as cells of the map that comes out, -1 where a block is cut."""
        tables = []
        for cells in self.sides:
            at = self.first(cells)[:, None] + torch.arange(0, self.block, self.stride)
            tables.append(torch.where(at < cells, at // self.stride, -1))
        return crossed(tables, self.out_sides)

    def keys(self) -> Int[Tensor, "blocks k"]:
        """Cells that each block sees, -1 beyond the border; with zeros there: cells of the map with its margin."""
        tables, sizes = [], []
        for cells in self.sides:
            at = self.first(cells)[:, None] + torch.arange(self.window)  # counted from the margin
            inside = (at >= self.halo) & (at < cells + self.halo)
            tables.append(torch.where(inside, at - self.halo, -1) if self.mask_pad else at)
            sizes.append(cells if self.mask_pad else self.padded(cells))
        return crossed(tables, sizes)

    def padded(self, cells: int) -> int:
        """Cells of an axis with whole blocks and the margin."""
        return -(-cells // self.block) * self.block + 2 * self.halo

    def with_margin(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h m d"]:
        """Zeros all around, if they are seen."""
        if self.mask_pad:
            return x
        around = [m for n in reversed(self.sides) for m in (self.halo, self.padded(n) - n - self.halo)]
        whole = torch.nn.functional.pad(x.unflatten(2, self.sides), (0, 0, *around))
        return whole.flatten(2, -2)

    def places(self, axis: int) -> Int[Tensor, "n w"]:
        """Of each query and each remainder r of w: which row of the table of an axis says how far the key is that it
        sees there. Row u - x + w - 1: u cells from the top of the window, x from the top of the block.
        """
        at = torch.arange(0, self.sides[axis], self.stride)
        inner, top = at % self.block, at - at % self.block
        u = (torch.arange(self.window) - top[:, None]) % self.window
        return u - inner[:, None] + self.window - 1

    def remainders(self, axis: int) -> Int[Tensor, " m"]:
        """Of each key, with those of the margin if they are seen."""
        n = self.sides[axis]
        return (torch.arange(n) + self.halo if self.mask_pad else torch.arange(self.padded(n))) % self.window


def halo_attention(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k dv"],
    tables: Sequence[Float[Tensor, "reach d"]],
    halo: Halo,
    *,
    scale_positions: bool = False,
) -> Float[Tensor, "b h q dv"]:
    """softmax_j(q.k_j / sqrt(d) + q.rows[u - x] + q.columns[v - y]) v over the window of the query's block.

    The w cells of a window have w different remainders of w along each axis: q goes on with what it says of each of
    them, k with a one in its own, and the relative terms are part of one product. Nothing is copied for a block.

    q: of the cells of `halo.out_sides`, in order of rows; of a causal line the last ones. k, v: of all cells
    tables: 2 w - 1 rows for each axis
    """
    scale = q.shape[-1] ** -0.5
    queries, keys = [q * scale], [halo.with_margin(k)]
    for axis, table in enumerate(tables):
        where = _on_map(halo.places(axis), axis, halo.out_sides)[-q.shape[2] :].to(q.device)
        said = (q @ table.T).gather(-1, where.expand(*q.shape[:2], -1, -1))
        queries.append(said * scale if scale_positions else said)
        sizes = halo.sides if halo.mask_pad else tuple(map(halo.padded, halo.sides))
        mine = _on_map(halo.remainders(axis)[:, None], axis, sizes)[:, 0].to(q.device)
        ones = torch.nn.functional.one_hot(mine, halo.window).to(k.dtype)
        keys.append(ones.expand(*k.shape[:2], -1, -1))
    return _attend(torch.cat(queries, -1), torch.cat(keys, -1), halo.with_margin(v), halo)


def _on_map(table: Int[Tensor, "n w"], axis: int, sides: Sequence[int]) -> Int[Tensor, "cells w"]:
    """Rows of one axis for every cell of the map."""
    before, behind = math.prod(sides[:axis]), math.prod(sides[axis + 1 :])
    return table.repeat_interleave(behind, 0).repeat(before, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, halo: Halo) -> Tensor:
    index, order = halo.keys().int().to(q.device), halo.queries()
    if halo.causal:
        n, cells = q.shape[2], halo.sides[0]
        whole = n == cells
        rows = index if whole else index[torch.arange(cells - n, cells) // halo.block]
        shape = {"q_block": halo.block if whole else 1, "queries": n, "keys": cells}
        return ops.attend(q, k, v, Gather(index=rows[None, None], **shape), scale=1.0)[0]
    shape = {"q_block": order.shape[1], "queries": order.numel(), "keys": k.shape[2], "causal": False}
    flat = order.flatten().to(q.device)
    out, _ = ops.attend(q[:, :, flat.clamp(min=0)], k, v, Gather(index=index[None, None], **shape), scale=1.0)
    real = (flat >= 0).nonzero()[:, 0]
    return out[:, :, real[flat[real].argsort()]]
