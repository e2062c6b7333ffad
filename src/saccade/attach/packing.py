"""Rows whose first tokens lie packed: packing them, and attention over both parts without spelling the packed one out.

A token that is read after the prompt finds packed what had been packed when the token before it was done. Many tokens
read in one forward find the same, each for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.attach.store import Bucket, Store
from saccade.core.method import Cache
from saccade.core.selection import dense

PIECE_TOKENS = 1024  # spelt out at a time


def pack(store: Store, method: Cache) -> None:
    """Pack the first tokens of every row, as far as the method says, behind what is packed already."""
    store.buckets = [_packed(bucket, method) for bucket in store.buckets]


def _packed(rows: Bucket, method: Cache) -> Bucket:
    more = method.packed_tokens(rows.length) - rows.front
    if more <= 0:
        return rows
    new = method.pack(*(rows.columns[name][:, :more] for name in ("keys", "values")))
    packed = {name: torch.cat([rows.packed[name], x], 1) if rows.packed else x for name, x in new.items()}
    # a copy: a view would hold on to what is packed now
    left = {name: c[:, more:].clone() for name, c in rows.columns.items()}
    return replace(rows, columns=left, packed=packed, space=None)


def attend(
    method: Cache, rows: Bucket, q: Float[Tensor, "r s q d"], *, scale: float, softcap: float | None
) -> Float[Tensor, "r s q d"]:
    """Each of the last `q` tokens of every row reads itself and all before it."""
    new = q.shape[2]
    front = [max(rows.front, method.packed_tokens(n)) for n in range(rows.length - new, rows.length)]
    out = []
    for until, some in itertools.groupby(range(new), key=front.__getitem__):
        alike = list(some)
        first, last = alike[0], alike[-1]
        there = rows.length - new + last + 1 - rows.front
        keys, values = (rows.columns[name][:, None, until - rows.front : there] for name in ("keys", "values"))
        mine = q[:, :, first : last + 1]
        parts = [ops.decode(mine, keys, values, scale=scale, softcap=softcap)]
        for k, v in _spelt_out(method, rows, until):
            whole = dense(mine.shape[2], k.shape[1], causal=False)
            parts.append(ops.attend(mine, k[:, None], v[:, None], whole, scale=scale, softcap=softcap))
        out.append(ops.merge_lse(*zip(*parts))[0])
    return torch.cat(out, 2)


def _spelt_out(method: Cache, rows: Bucket, until: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of the first `until` tokens as packing leaves them, piece by piece; none of it stays."""
    if rows.front:
        units = next(iter(rows.packed.values())).shape[1]
        step = max(1, PIECE_TOKENS * units // rows.front)
        for start in range(0, units, step):
            yield method.unpack({name: x[:, start : start + step] for name, x in rows.packed.items()})
    if until > rows.front:
        yield method.unpack(method.pack(*(rows.columns[name][:, : until - rows.front] for name in ("keys", "values"))))
