"""What each kind of Selection means, pair by pair in plain Python: slow, and without a line of the real code."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def table(rows: int, keys: int, computed) -> Tensor:
    """[rows keys], True where `computed(query's key index, key)`."""
    offset = keys - rows
    cells = [[bool(computed(offset + i, j)) for j in range(keys)] for i in range(rows)]
    return torch.tensor(cells, dtype=torch.bool).reshape(rows, keys)


def causal(mask: Tensor, on: bool) -> Tensor:
    """The same without the keys behind each query."""
    return mask & table(*mask.shape, lambda i, j: j <= i) if on else mask


def blocks(keep: list[list[bool]], queries: int, keys: int, q_block: int, k_block: int) -> Tensor:
    """keep[i][j]: query block i looks at key block j."""
    offset = keys - queries
    return table(queries, keys, lambda i, j: keep[(i - offset) // q_block][j // k_block])


def gathered(
    index: list[list[int]], ranges: list[list[tuple[int, int]]], queries: int, keys: int, block: int
) -> Tensor:
    """One list of keys and one of ranges for each query block."""
    offset = keys - queries

    def computed(i, j):
        at = (i - offset) // block
        return j in index[at] or any(a <= j < b for a, b in ranges[at])

    return table(queries, keys, computed)


def line(sinks: int, window: int, dilation: int, queries: int, keys: int, is_causal: bool) -> Tensor:
    """Sinks and a dilated window."""

    def computed(i, j):
        behind = i - j if is_causal else abs(i - j)
        return j < sinks or (behind < window and behind % dilation == 0)

    return table(queries, keys, computed)


def neighbours(grid: tuple[int, ...], kernel: tuple[int, ...], dilation: int) -> Tensor:
    """Neighbourhood attention: on each axis, of the cells with the query's own remainder by `dilation`, the `width`
    consecutive ones that hold the query most nearly in their middle."""

    def window(c: int, size: int, width: int) -> list[int]:
        own = list(range(c % dilation, size, dilation))
        if len(own) <= width:
            return own
        first = min(max(own.index(c) - width // 2, 0), len(own) - width)
        return own[first : first + width]

    cells = list(itertools.product(*map(range, grid)))
    near = [[window(c, s, w) for c, s, w in zip(cell, grid, kernel)] for cell in cells]
    return table(len(cells), len(cells), lambda i, j: all(c in at for c, at in zip(cells[j], near[i])))


def lines(verticals: list[int], slashes: list[int], queries: int, keys: int, block: int) -> Tensor:
    """The walk of MInference's index builder: growing ranges from far to near diagonals, then single columns."""
    offset, computed = keys - queries, set()
    for first in range(0, queries, block):
        end, runs = offset + first + block, []
        for o in sorted((o for o in slashes if 0 <= o < end), reverse=True):
            edge = max(end - o, block)
            if not runs or edge > runs[-1][1] + block:
                runs.append([edge - block, edge])
            elif edge > runs[-1][1]:
                runs[-1][1] += block
        seen = {c for a, b in runs for c in range(a, b)} | {c for c in verticals if c >= 0}
        computed |= {(offset + first + r, c) for r in range(block) for c in seen}
    return table(queries, keys, lambda i, j: (i, j) in computed)
