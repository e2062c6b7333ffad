"""Keys and values in host memory: how they get there, and attention over them and what is on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.attach.store import Bucket
from saccade.core.selection import Gather
from saccade.core.site import Far


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory, pinned where the tensor is on a CUDA device."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x) if x.is_cuda else x.clone()


def shelve(rows: Bucket, first: int, index: Sequence[object]) -> tuple[Bucket, list[Far]]:
    """The rows of whole sequences without the tokens of an index each, from `first` on; and those, in host memory."""
    last = first + index[0].keys.shape[1]
    heads = index[0].keys.shape[0]
    at = torch.arange(rows.length, device=rows.rows.device)
    stays = torch.cat([at[:first], at[last:]]).expand(len(rows.rows), -1)
    values = rows.columns["values"][:, first:last].unflatten(0, (-1, heads))
    positions = rows.positions[:, first:last].unflatten(0, (-1, heads))
    moved = zip(index, values, positions)
    return rows.take(stays), [Far(first, i.moved(to_host), to_host(v), to_host(p)) for i, v, p in moved]


def tensors(far: Far) -> list[Tensor]:
    """All that is held of it."""
    return [far.values, far.positions, *far.index.tensors()]


def attend(
    q: Float[Tensor, "b h q d"], stored: dict[str, Tensor], far: Sequence[Far], selection: Gather, **options: float
) -> Float[Tensor, "b h q d"]:
    """Attention over a selection of everything, `stored` on the device and `far`: each alone, and merged."""
    first, count = far[0].first, far[0].count
    index, ranges = selection.index.expand(*q.shape[:2], -1, -1), selection.ranges
    between = () if ranges is None else ((ranges > first) & (ranges < first + count)).nonzero()
    assert not len(between), "a range that ends among the far tokens"
    inside = (index >= first) & (index < first + count)
    near = Gather(
        index=torch.where(inside, -1, _without(index, first, count)),
        ranges=None if ranges is None else _without(ranges, first, count),
        queries=selection.queries,
        keys=selection.keys - count,
    )
    parts = [ops.attend(q, stored["keys"], stored["values"], near, **options)]
    if bool(inside.any()):
        parts.append(_far(q, far, torch.where(inside, index - first, -1), **options))
    return ops.merge_lse(*zip(*parts))[0]


def _without(place: Int[Tensor, "*a"], first: int, count: int) -> Int[Tensor, "*a"]:
    """Places among all stored tokens as places among those on the device."""
    return torch.where(place >= first + count, place - count, place)


def _far(
    q: Float[Tensor, "b h q d"], far: Sequence[Far], index: Int[Tensor, "b h q l"], **options: float
) -> tuple[Tensor, Tensor]:
    """Each query over its own list. Only what is listed is copied to the device."""
    b, h, n, _ = q.shape
    head = torch.arange(h)[:, None, None] // (h // far[0].index.keys.shape[0])
    places = index.clamp(min=0).to(far[0].positions.device)
    keys = torch.stack([f.index.keys[head, place] for f, place in zip(far, places)])
    values = torch.stack([f.values[head, place] for f, place in zip(far, places)])
    keys, values = (x.to(q.device).transpose(1, 2).flatten(0, 1) for x in (keys, values))
    visible = (index >= 0).transpose(1, 2).flatten(0, 1)[:, :, None]
    alone = q.transpose(1, 2).flatten(0, 1)[:, :, None]  # a row of the batch for each query
    out, lse = ops.decode(alone, keys, values, visible=visible, **options)
    return out.view(b, n, h, -1).transpose(1, 2), lse.view(b, n, h).transpose(1, 2)
