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
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """Attention over a selection of everything, `stored` on the device and `far`: each alone, and merged.

    No range of the selection begins or ends among the far tokens. The device is not waited for.
    """
    first, count = far[0].first, far[0].count
    index = selection.index.expand(*q.shape[:2], -1, -1)
    inside = (index >= first) & (index < first + count)
    near = Gather(
        index=torch.where(inside, -1, _without(index, first, count)),
        ranges=None if selection.ranges is None else _without(selection.ranges, first, count),
        queries=selection.queries,
        keys=selection.keys - count,
    )
    here = ops.decode(q, stored["keys"], stored["values"], visible=near.mask(), **options)
    if not index.shape[-1]:
        return here
    there = _far(q, far, torch.where(inside, index - first, -1), **options)
    return ops.merge_lse(*zip(here, there))


def _without(place: Int[Tensor, "*a"], first: int, count: int) -> Int[Tensor, "*a"]:
    """Places among all stored tokens as places among those on the device."""
    return torch.where(place >= first + count, place - count, place)


def _far(
    q: Float[Tensor, "b h q d"], far: Sequence[Far], index: Int[Tensor, "b h q l"], **options: float
) -> tuple[Tensor, Tensor]:
    """Each query over its own list. Only what is listed comes to the device."""
    (b, h, n, length), g = index.shape, len(far[0].values)
    places = index.reshape(b, g, h // g * n, length)  # of all queries that share a key/value head
    keys = torch.stack([ops.fetch(f.index.keys, place) for f, place in zip(far, places)])
    values = torch.stack([ops.fetch(f.values, place) for f, place in zip(far, places)])
    keys, values = (x.view(b * h * n, 1, length, x.shape[-1]) for x in (keys, values))
    alone = q.reshape(b * h * n, 1, 1, -1)  # a row of the batch for each query
    out, lse = ops.decode(alone, keys, values, visible=(index >= 0).view(b * h * n, 1, 1, length), **options)
    return out.view(b, h, n, -1), lse.view(b, h, n)
