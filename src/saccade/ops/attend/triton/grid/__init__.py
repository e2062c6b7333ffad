"""A neighbourhood on a grid, as the kernels walk it: boxes of cells, by arithmetic; no lists, no copy of the keys.

Along an axis of m cells and windows of w, cell c sees w cells from

    first(c) = min(max(c - w // 2, 0), max(m - w, 0))

on, and is seen by the cells [0 if c < w else c - w + 1 + w // 2, m - 1 if c >= m - w else c + w // 2]: near a border
the two are not the same. Cells that differ in the remainder of the dilation never meet: each combination of remainders
is a grid of its own, undilated. A program takes a box of queries (for dK and dV: of keys) of one such grid; what its
first and its last cell see spans a larger box, which is walked in steps of a box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from saccade.core.selection import Spans

AXES = 3

Cells = tuple[int, int, int]  # along z, y, x


@dataclass(frozen=True)
class Grid:
    """Fewer axes than three have a size of 1 in front. `gap`: the dilation, at most the size."""

    size: Cells
    wide: Cells
    gap: Cells
    causal: bool

    @property
    def axes(self) -> int:
        """Those that count: all from the first that is longer than 1."""
        return max([AXES - i for i in range(AXES) if self.size[i] > 1], default=1)

    @property
    def tokens(self) -> int:
        """Cells of the grid."""
        return math.prod(self.size)

    def tiles(self, box: Cells) -> int:
        """Boxes that hold all cells, of all remainders."""
        cells = [-(-n // g) for n, g in zip(self.size, self.gap)]
        return math.prod(-(-n // b) * g for n, g, b in zip(cells, self.gap, box))

    def box(self, cells: int) -> Cells:
        """A box of so many cells (a power of two), as even as the grid allows, longest along the last axis."""
        found = [1] * AXES
        room = [-(-n // g) for n, g in zip(self.size, self.gap)]
        while math.prod(found) < cells:
            open_ = [i for i in range(AXES) if found[i] < room[i]] or [AXES - 1]
            found[min(open_, key=lambda i: (found[i], -i))] *= 2
        return found[0], found[1], found[2]


def of(selection: Spans) -> Grid:
    """The neighbourhood of a selection that has one."""
    assert selection.grid is not None and selection.kernel is not None
    assert selection.queries == selection.keys == math.prod(selection.grid), "a grid asks about all of its cells"
    more = (1,) * (AXES - len(selection.grid))
    size, wide = (*more, *selection.grid), (*more, *(min(w, n) for w, n in zip(selection.kernel, selection.grid)))
    gap = tuple(max(1, min(selection.dilation, n)) for n in size)
    return Grid(size, wide, gap, selection.causal)  # type: ignore[arg-type]


def reasons(selection: Spans) -> list[str]:
    """Why it cannot be computed as boxes; [] means that it can."""
    grid, kernel = selection.grid or (), selection.kernel or ()
    if len(grid) > AXES:
        return [f"a grid of {len(grid)} axes; it takes up to {AXES}"]
    if len(kernel) != len(grid) or min(kernel, default=1) < 1:
        return [f"a neighbourhood of {tuple(kernel)} on a grid of {tuple(grid)}; it takes 1 or more along each axis"]
    return []
