"""A selection as the lists that the kernels walk: no copy where the selection holds them already."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.selection import Blocks, Gather, Lines, PerHead, Selection, Spans
from saccade.ops.attend.tiles import axes

TILE = 64  # keys: blocks that are whole multiples of it are read as tiles, others key by key
FEWEST = 16  # rows of a product
MOST = 128  # rows of a program
MOST_WIDE = 32  # the same in float32, whose products need all rows and columns in registers


@dataclass(frozen=True, kw_only=True)
class Lists:
    """What some query heads look at. Unused tensors are None; a size of 1 in the first three axes stands for all.

    `heads`: which query heads, None for all. `col`: per query block the numbers of runs of `width` keys, the first of
    which is number * `step`; by `crow` one after the other, or in a table that holds `count` of them each. `index`: key
    lists. `bits`: which of them count. `ranges`: [start, end). `sinks`, `window`: per head. `pack`: heads of a group
    that a program takes together, since their lists are one. `most`: rows of a program.
    """

    causal: bool
    queries: int
    keys: int
    q_block: int
    heads: Int[Tensor, " heads"] | None = None
    crow: Int[Tensor, "b h nqb+1"] | None = None
    count: Int[Tensor, "b h nqb"] | None = None
    col: Int[Tensor, "b h nnz"] | Int[Tensor, "b h nqb t"] | None = None
    step: int = 1
    width: int = 1
    index: Int[Tensor, "b h nqb l"] | None = None
    bits: Int[Tensor, "b h nqb w"] | None = None
    ranges: Int[Tensor, "b h nqb r 2"] | None = None
    sinks: Int[Tensor, " h"] | None = None
    window: Int[Tensor, " h"] | None = None
    pack: int = 1
    most: int = MOST

    @property
    def rows(self) -> int:
        """Queries of a program, before heads are taken together."""
        return min(self.most, 1 << (min(self.q_block, max(self.queries, 1)) - 1).bit_length())

    @property
    def turnable(self) -> bool:
        """Whether the queries of each key can be listed as whole tiles."""
        if self.sinks is not None:
            return True
        square = self.crow is not None and self.index is None and self.q_block % TILE == 0 and self.width % TILE == 0
        return square and self.step == self.width


def reasons(selection: Selection) -> list[str]:
    """Why the kernels cannot walk it; [] means that they can."""
    if isinstance(selection, PerHead):
        return list(dict.fromkeys(why for _, part in selection.parts for why in reasons(part)))
    if isinstance(selection, Spans):
        odd = ["a neighbourhood on a grid"] if selection.grid else []
        odd += ["a dilated window"] if selection.dilation > 1 else []
        return [f"it takes spans along the line, undilated; the selection is {what}" for what in odd]
    if not isinstance(selection, (Blocks, Gather, Lines)):
        some = "blocks, gather, lines and spans, and buckets where all heads have them"
        return [f"it takes {some}; the selection is of {selection.kind}"]
    return []


def listed(selection: Selection, q: Float[Tensor, "b h q d"], group: int) -> list[Lists]:
    """One for each kind that the heads look at."""
    device, heads, most = q.device, q.shape[1], _most(q)
    if not isinstance(selection, PerHead):
        one = dataclasses.replace(_lists(selection, device), most=most)
        return [dataclasses.replace(one, pack=_pack(one, selection, heads, group))]
    out = []
    for members, part in selection.parts:
        order = torch.argsort(members.to("cpu"))
        if len(order):
            part = _taken(part, order)
            mine = members.cpu()[order].int().to(device)
            out.append(dataclasses.replace(_lists(part, device), heads=mine, most=most))
    return out


def _most(q: Float[Tensor, "b h q d"]) -> int:
    """Rows of a program: fewer where they are wide."""
    if q.dtype == torch.float32:
        return MOST_WIDE
    return MOST if q.shape[-1] <= 128 else MOST // 2


def _taken(part: Selection, order: Int[Tensor, " heads"]) -> Selection:
    """The same with its heads in another order: ascending, so that those of a group follow on one another."""
    if axes(part)[1] == 1 or bool((order == torch.arange(len(order))).all()):
        return part
    fields = {n: x for n, x in vars(part).items() if isinstance(x, Tensor)}
    axis = 0 if isinstance(part, Spans) else 1
    turned = {n: x.index_select(axis, order.to(x.device)) if x.shape[axis] > 1 else x for n, x in fields.items()}
    return dataclasses.replace(part, **turned)


def _lists(s: Selection, device: torch.device) -> Lists:
    shape = {"causal": s.causal, "queries": s.queries, "keys": s.keys}
    match s:
        case Blocks():
            crow, col = _on(s.crow, device), _on(s.col, device)
            return Lists(crow=crow, col=col, step=s.k_block, width=s.k_block, q_block=s.q_block, **shape)
        case Gather():
            ranges = None if s.ranges is None else _on(s.ranges, device)
            return Lists(index=_on(s.index, device), ranges=ranges, q_block=s.q_block, **shape)
        case Lines():
            return _drawn(s, device, shape)
        case Spans():
            sinks, window = (x.clamp(max=s.widest).to(device, torch.int32).contiguous() for x in (s.sinks, s.window))
            most = max(len(sinks), len(window))
            both = (x.expand(most).contiguous() for x in (sinks, window))
            return Lists(**dict(zip(("sinks", "window"), both)), q_block=MOST, **shape)
    raise AssertionError(f"a new kind of selection: {s.kind}")


def _on(x: Tensor, device: torch.device) -> Tensor:
    """There, and with its last axis (of ranges, its last two) in one piece."""
    x = x.to(device, torch.int32)
    return x.contiguous() if x.stride(-1) != 1 or x.dim() == 5 else x


def _drawn(s: Lines, device: torch.device, shape: dict) -> Lists:
    """Runs as a table, and the columns with a bit for those that lie in none."""
    from saccade.ops.attend.triton.lines import drawn

    count, runs, columns, bits = drawn(s, device)
    lists = {"count": count, "col": runs, "index": columns, "bits": bits}
    return Lists(**lists, step=1, width=s.block, q_block=s.block, **shape)


def _pack(one: Lists, selection: Selection, heads: int, group: int) -> int:
    """How many heads of a group a program takes: those with the same lists, as far as the rows go."""
    most = min(group, one.most // one.rows)
    if most < 2 or not _shared(selection, heads, group):
        return 1
    return most


def _shared(s: Selection, heads: int, group: int) -> bool:
    """Whether the heads of every group have the same lists. The one question that the host asks the device."""
    if axes(s)[1] == 1:
        return True
    tensors = [x for x in vars(s).values() if isinstance(x, Tensor)]
    if isinstance(s, Spans) or (any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing()):
        return False
    alike = [_same(x.unflatten(1, (heads // group, group))) for x in tensors if x.shape[1] > 1]
    return bool(torch.stack(alike).all())


def _same(x: Int[Tensor, "b g s ..."]) -> Bool[Tensor, ""]:
    return (x == x[:, :, :1]).all()


@functools.lru_cache(maxsize=64)
def steps(n: int, device: torch.device) -> Int[Tensor, " n"]:
    """0 .. n - 1."""
    return torch.arange(n, device=device)


def strides(*tensors: Tensor | None) -> list[int]:
    """Of the first three axes; 0 where there is none."""
    return [n for x in tensors for n in ((0, 0, 0) if x is None else x.stride()[:3])]


def lined(x: Tensor | None, axes: int = 2) -> list[int]:
    """Strides of a list's first axes; 0 where one row stands for all."""
    return [0 if x is None or x.shape[i] == 1 else x.stride(i) for i in range(axes)]


def apart(x: Tensor | None) -> int:
    """Between those of two batch rows; 0 where one stands for all."""
    return lined(x, 1)[0]


MEMBER = 1 << 16  # what a head counts for, in a list of query blocks of several heads


def turned(
    one: Lists, heads: int | None = None, group: int = 1
) -> tuple[Int[Tensor, "b h nkb+1"], Int[Tensor, "b h nnz"]]:
    """Blocks by their key block: where each begins, and the query blocks that list it, ascending. On the device.

    With the number of `heads`, those of `group` in a row together: number in the group * MEMBER + query block."""
    assert one.crow is not None and one.col is not None
    crow, col = one.crow, one.col
    b, h, nnz = max(crow.shape[0], col.shape[0]), heads or max(crow.shape[1], col.shape[1]), col.shape[2]
    crow, col = crow.expand(b, h, -1).contiguous(), col.expand(b, h, -1).contiguous()
    entry = steps(nnz, col.device).expand(b, h, nnz).contiguous()
    row = torch.searchsorted(crow[..., 1:].contiguous(), entry, right=True, out_int32=True)
    nkb = -(-one.keys // one.step)
    blocks = torch.where((col >= 0) & (entry < crow[..., -1:]), col, nkb)
    if group > 1:
        row = row + (steps(h, col.device) % group * MEMBER).int()[:, None]
        row, blocks = (x.view(b, h // group, group * nnz) for x in (row, blocks))
    ordered, order = blocks.sort(dim=-1, stable=True)
    edges = steps(nkb + 1, col.device).expand(*blocks.shape[:2], nkb + 1).contiguous()
    first = torch.searchsorted(ordered.contiguous(), edges.to(ordered.dtype), out_int32=True)
    return first, row.gather(-1, order)


LEAST = 8  # query blocks of a piece
SPREAD = 1024  # pieces, or so: some for each multiprocessor, and few enough that their sums fit


@dataclass(frozen=True)
class Pieces:
    """The query blocks that look at a key block, in pieces of at most `most`: the first keys are looked at by many more
    than others. `rows`: of each piece its key block, its first entry and, if it is not alone, the place of its sum; a
    key block of -1 stands for no piece. `of`: for each key block the first place, and how many. Key blocks are counted
    through all key/value heads."""

    rows: Int[Tensor, "b pieces 3"]
    of: Int[Tensor, "b blocks 2"]
    most: int
    places: int


def pieces(crow: Int[Tensor, "b h nkb+1"], first: Int[Tensor, " kv+1"], lines: int, entries: int) -> Pieces:
    """`crow`: of transposed lists of at most `entries` each; `first`: the first of the `lines` of each key/value head.
    On the device: the host does not wait."""
    count = (crow[..., 1:] - crow[..., :-1]).expand(-1, lines, -1)
    before = torch.nn.functional.pad(count.cumsum(1), (0, 0, 1, 0))
    many = (before.index_select(1, first[1:]) - before.index_select(1, first[:-1])).flatten(1)
    most = max(LEAST, -(-lines * entries * len(crow) // SPREAD))
    cut = ((many + most - 1) // most).clamp(min=1)
    ends, blocks = cut.cumsum(1), many.shape[1]
    piece = steps(blocks + lines * entries // most, crow.device).expand(len(crow), -1).contiguous()
    block = torch.searchsorted(ends, piece, right=True)
    at = block.clamp(max=blocks - 1)
    chunk = piece - (ends - cut).gather(1, at)
    split = torch.where(cut > 1, cut, 0)
    place = split.cumsum(1) - split
    mine = torch.where(cut.gather(1, at) > 1, place.gather(1, at) + chunk, -1)
    rows = torch.stack([torch.where(block < blocks, block, -1), chunk * most, mine], -1)
    of = torch.stack([place, split], -1)
    return Pieces(rows.int(), of.int(), most, places=2 * lines * entries // most)
