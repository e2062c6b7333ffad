"""Rows whose first tokens lie packed: packing them, and attention over both parts without spelling the packed one out.

A token that is read after the prompt finds packed what had been packed when the token before it was done. Many tokens
read in one forward find the same, each for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.attach.store import Bucket, Columns, Store, regroup
from saccade.core.method import Cache
from saccade.core.selection import dense

PIECE_TOKENS = 1024  # spelt out at a time


def pack(store: Store, method: Cache, prompt_end: bool) -> None:
    """Pack the first tokens of every row, as far as the method says, behind what is packed already."""
    if method.marks:
        units = [(b, b.length if prompt_end else method.unit_tokens) for b in store.buckets]
        store.buckets = regroup(itertools.chain(*[_apart(b, method, b.length, unit) for b, unit in units]))
    else:
        store.buckets = [_packed(bucket, method) for bucket in store.buckets]


def _apart(rows: Bucket, method: Cache, until: int, unit: int) -> list[Bucket]:
    """Rows whose tokens before `until` lie packed, unit by unit; those with other numbers of marked tokens part."""
    if not unit or rows.front + unit > until:
        return [rows]
    counts, out = rows.columns["marks"][:, :unit].sum(-1), []
    for count in counts.unique().tolist():
        some = (counts == count).nonzero()[:, 0]
        part = rows if len(some) == len(counts) else rows.pick(some)
        out += _apart(_unit_apart(part, method, unit, count), method, until, unit)
    return out


def _unit_apart(rows: Bucket, method: Cache, unit: int, count: int) -> Bucket:
    """Rows with one more unit packed, of which each has so many marked tokens."""
    columns = {name: rows.columns[name][:, :unit] for name in ("keys", "values", "marks")}
    order = columns.pop("marks").to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    both = Bucket(rows.rows, rows.positions[:, rows.front : rows.front + unit], columns).take(order).columns
    k, v = both["keys"], both["values"]
    return _behind(rows, method.pack_apart((k[:, :count], v[:, :count]), (k[:, count:], v[:, count:])), unit)


def _packed(rows: Bucket, method: Cache) -> Bucket:
    more = method.packed_tokens(rows.length) - rows.front
    if more <= 0:
        return rows
    return _behind(rows, method.pack(*(rows.columns[name][:, :more] for name in ("keys", "values"))), more)


def _behind(rows: Bucket, new: Columns, more: int) -> Bucket:
    """Rows whose next tokens lie packed, as `new`."""
    packed = {name: torch.cat([rows.packed[name], x], 1) if rows.packed else x for name, x in new.items()}
    # a copy: a view would hold on to what is packed now
    left = {name: c[:, more:].clone() for name, c in rows.columns.items()}
    return replace(rows, columns=left, packed=packed, space=None)


def attend(
    method: Cache, rows: Bucket, q: Float[Tensor, "r s q d"], *, scale: float, softcap: float | None
) -> tuple[Float[Tensor, "r s q d"], Float[Tensor, "r s q"]]:
    """Each of the last `q` tokens of every row reads itself and all before it: output and log-sum-exp."""
    new = q.shape[2]
    front = [_until(method, rows, n) for n in range(rows.length - new, rows.length)]
    out = []
    for until, some in itertools.groupby(range(new), key=front.__getitem__):
        alike = list(some)
        first, last = alike[0], alike[-1]
        there = rows.length - new + last + 1 - rows.front
        keys, values = (rows.columns[name][:, None, until - rows.front : there] for name in ("keys", "values"))
        mine = q[:, :, first : last + 1]
        parts = [ops.decode(mine, keys, values, scale=scale, softcap=softcap)]
        read = _read_apart if method.marks else _read_spelt_out
        parts += read(method, rows, mine, until, scale=scale, softcap=softcap)
        out.append(ops.merge_lse(*zip(*parts)))
    outs, lses = zip(*out)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _until(method: Cache, rows: Bucket, tokens: int) -> int:
    """How many of so many tokens a later one finds packed."""
    if not method.marks:
        return max(rows.front, method.packed_tokens(tokens))
    return rows.front + max(0, tokens - rows.front) // method.unit_tokens * method.unit_tokens


def _read_apart(
    method: Cache, rows: Bucket, q: Float[Tensor, "r s q d"], until: int, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """What lies packed, and what does not yet because it may be taken back, or comes in the same forward."""
    if rows.front:
        yield method.read(q, rows.packed, **options)
    if until > rows.front:
        at, n = torch.arange(len(rows.rows), device=q.device), until - rows.front
        loose = Bucket(at, rows.positions[:, rows.front : until], {name: c[:, :n] for name, c in rows.columns.items()})
        some = _apart(loose, method, n, method.unit_tokens)
        out, lse = zip(*[method.read(q.index_select(0, part.rows), part.packed, **options) for part in some])
        order = torch.cat([part.rows for part in some]).argsort()
        yield torch.cat(out).index_select(0, order), torch.cat(lse).index_select(0, order)


def _read_spelt_out(
    method: Cache, rows: Bucket, q: Float[Tensor, "r s q d"], until: int, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    for k, v in _spelt_out(method, rows, until):
        whole = dense(q.shape[2], k.shape[1], causal=False)
        yield ops.attend(q, k[:, None], v[:, None], whole, **options)


def _spelt_out(method: Cache, rows: Bucket, until: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of the first `until` tokens as packing leaves them, piece by piece; none of it stays."""
    if rows.front:
        units = next(iter(rows.packed.values())).shape[1]
        step = max(1, PIECE_TOKENS * units // rows.front)
        for start in range(0, units, step):
            yield method.unpack({name: x[:, start : start + step] for name, x in rows.packed.items()})
    if until > rows.front:
        yield method.unpack(method.pack(*(rows.columns[name][:, : until - rows.front] for name in ("keys", "values"))))
