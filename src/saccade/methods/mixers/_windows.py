"""Windows along one axis, and their product on a grid: who sees whom, by tables of indices."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from saccade.core.errors import BadOption
from saccade.core.selection import Gather, Selection, Spans

TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}  # queries of one product, along each axis of a grid


@dataclass(frozen=True)
class Axis:
    """Windows along one axis: `kernel` cells, every `dilation`-th; `stride` queries in a row share the window of one of
    them; causal: the window ends at the query, and is cut at the first cell.

    Raises:
        BadOption: a window that does not fit the axis, or a stride wider than the window.
    """

    cells: int
    kernel: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def __post_init__(self):
        asked = f"windows of {self.kernel} cells, dilation {self.dilation}, stride {self.stride}, over {self.cells}"
        if min(self.kernel, self.dilation, self.stride) < 1:
            raise BadOption(asked, "all of these must be 1 or more", "Leave dilation and stride away for 1.")
        if self.stride > self.kernel:
            raise BadOption(asked, "queries between two windows would not see themselves", "Give a smaller stride.")
        if not self.causal and self.kernel * self.dilation > self.cells:
            found = f"they reach over {self.kernel * self.dilation} cells and are not cut"
            raise BadOption(asked, found, "Give a smaller kernel or dilation.")

    def keys(self) -> Int[Tensor, "n k"]:
        """What each cell sees, ascending; -1: nothing.

        Within the cells of one remainder of the dilation, m of them: leader = min(floor(i / s) s + s // 2, m - 1), and
        the window is [leader - k // 2, ...) of k cells, moved inwards at both ends.
        """
        m, i, rest = self._within()
        if self.causal:
            leader = torch.minimum(i // self.stride * self.stride + self.stride - 1, m - 1)
            first = (leader - self.kernel + 1).clamp(min=0)
        else:
            leader = torch.minimum(i // self.stride * self.stride + self.stride // 2, m - 1)
            first = torch.minimum((leader - self.kernel // 2).clamp(min=0), m - self.kernel)
        at = first[:, None] + torch.arange(self.kernel)
        seen = at <= i[:, None] if self.causal else torch.ones_like(at, dtype=torch.bool)
        return torch.where(seen, at * self.dilation + rest[:, None], -1)

    def _within(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each cell: cells of its remainder, its place among them, the remainder."""
        cell = torch.arange(self.cells)
        rest = cell % self.dilation
        return (self.cells - rest + self.dilation - 1) // self.dilation, cell // self.dilation, rest

    def alike(self) -> Int[Tensor, "groups s"]:
        """Cells that share one list, -1 where a group is short."""
        if self.causal:  # each its own, cut at itself
            return torch.arange(self.cells)[:, None]
        _, i, rest = self._within()
        number = i // self.stride * self.dilation + rest
        groups = torch.full((int(number.max()) + 1, self.stride), -1)
        groups[number, i % self.stride] = torch.arange(self.cells)
        return groups[(groups >= 0).any(1)]

    def order(self) -> Int[Tensor, " n"]:
        """Cells by their remainder, so that every window is one run."""
        _, i, rest = self._within()
        return (rest * self.cells + i).argsort()


@dataclass(frozen=True)
class Windows:
    """A neighbourhood on a grid of one to three axes: the product of windows along each."""

    axes: tuple[Axis, ...]

    @property
    def cells(self) -> int:
        """Of the grid."""
        return math.prod(axis.cells for axis in self.axes)

    def keys(self) -> Int[Tensor, "n k"]:
        """What each cell of the grid sees, -1: nothing."""
        return self._crossed([axis.keys() for axis in self.axes])

    def selection(self, device: torch.device) -> tuple[Selection, Int[Tensor, " q"] | None]:
        """Pairs for the queries in this order, where -1 stands for none, so that those with one window lie together.
        None: as they come.
        """
        n, first = self.cells, self.axes[0]
        one = torch.ones(1, dtype=torch.long)
        if len(self.axes) == 1 and first.causal and first.stride == 1:
            none, wide = torch.zeros(1, dtype=torch.long), one * first.kernel * first.dilation
            return Spans(sinks=none, window=wide, dilation=first.dilation, queries=n, keys=n), None
        if not any(a.causal or a.stride > 1 or a.dilation != first.dilation for a in self.axes):
            grid, kernel = tuple(a.cells for a in self.axes), tuple(a.kernel for a in self.axes)
            shape = {"grid": grid, "kernel": kernel, "dilation": first.dilation, "queries": n, "keys": n}
            return Spans(sinks=one, window=one, causal=False, **shape), None
        groups = [axis.alike() for axis in self.axes]
        lists = [axis.keys()[group[:, 0]] for axis, group in zip(self.axes, groups)]
        index, order = self._crossed(lists).int()[None, None].to(device), self._crossed(groups)
        shape = {"q_block": order.shape[1], "queries": order.numel(), "keys": n}
        return Gather(index=index, causal=False, **shape), order.flatten().to(device)

    def _crossed(self, tables: Sequence[Tensor]) -> Tensor:
        """Indices along each axis to indices of the grid."""
        return crossed(tables, [axis.cells for axis in self.axes])

    def tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T t], the keys that one of them sees [T R], and where in those each finds its own [T t k]."""
        every = [_tiles(axis, t) for axis, t in zip(self.axes, TILES[len(self.axes)])]
        queries, keys, where = zip(*every)
        return self._crossed(queries), self._crossed(keys), crossed(where, [x.shape[1] for x in keys])


def crossed(tables: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """From indices along each axis to indices of a grid of these sizes, for all combinations of their rows, columns
    and so on; -1 where one of them is."""

    def cross(a: Tensor, other: tuple[Tensor, int]) -> Tensor:
        b, size = other
        for axis in range(a.dim()):
            a, b = a.unsqueeze(2 * axis + 1), b.unsqueeze(2 * axis)
        whole = torch.where((a >= 0) & (b >= 0), a * size + b, -1)
        return whole.reshape(*[whole.shape[i] * whole.shape[i + 1] for i in range(0, whole.dim(), 2)])

    return functools.reduce(cross, zip(tables[1:], sizes[1:]), tables[0])


def _tiles(axis: Axis, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same along one axis."""
    order, seen = axis.order(), axis.keys()
    queries = torch.nn.functional.pad(order, (0, -len(order) % size), value=-1).view(-1, size)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    mine = torch.where((queries < 0)[..., None] | (seen[queries] < 0), -1, place[seen[queries]])  # [T t k]
    low = torch.where(mine < 0, len(order), mine).amin((1, 2))
    wide = int((mine.amax((1, 2)) - low).max()) + 1
    low = low.clamp(max=len(order) - wide)
    keys = order[low[:, None] + torch.arange(wide)]
    return queries, keys, torch.where(mine < 0, -1, mine - low[:, None, None])
