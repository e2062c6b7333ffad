"""Attention of a text that lies in parts on several processes: keys and values go round, results merge by log-sum-exp.

Only what is seen by position can be computed so: everything, or first tokens and a window, by head. Each process holds
its own tokens and, while they pass, those of one other; what passed is not kept for the gradients but passes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.layout import Chunk, Layout
from saccade.core.selection import Selection, Spans, dense
from saccade.ops.attend.api import attend, check
from saccade.ops.merge_lse.api import merge_lse


def ring_attend(
    q: Float[Tensor, "b h m d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    selection: Spans,
    layout: Layout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b h m dv"]:
    """`attend` over a causal selection of the whole text, for the queries here; differentiable in q, k and v.

    All processes call it with their tokens of the same text, as the layout says.

    Raises:
        BadInput: a selection that is not first tokens and a window, of other sizes than the text, or that differs
            among the query heads of a key/value head; tensors that do not fit together.
    """
    check(q, k, v)
    _check(q, k, selection, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    task = _Task(_kinds(selection, q.shape[1], k.shape[1], q.device), layout, scale, softcap)
    return _Ring.apply(q, k, v, task)


def _check(q: Tensor, k: Tensor, selection: Spans, layout: Layout) -> None:
    asked = f"attention over {layout.tokens} tokens among {layout.ranks} processes"
    if not isinstance(selection, Spans) or selection.grid or selection.dilation > 1 or not selection.causal:
        found = f"the selection ({selection.kind}) is more than first tokens and a causal window"
        raise BadInput(asked, found, "Share heads among the processes instead.")
    if selection.queries != layout.tokens or selection.keys != layout.tokens:
        found = f"the selection is for {selection.queries} queries over {selection.keys} keys"
        raise BadInput(asked, found, "Make it for the whole text.")
    if q.shape[2] != layout.here or k.shape[2] != layout.here:
        found = f"rank {layout.rank} has {q.shape[2]} queries and {k.shape[2]} keys, and its share is {layout.here}"
        raise BadInput(asked, found, "Cut the text as the layout says.")


@dataclass(frozen=True)
class _Kind:
    """Heads that see the same: the first tokens, and those less than a window behind. None: these are all heads."""

    heads: Tensor | None  # of the queries
    kv_heads: Tensor | None
    sinks: int
    window: int


@dataclass(frozen=True)
class _Piece:
    """Queries [q0, q1) over keys [k0, k1) of two chunks. backwards: as a selection of both in reverse order."""

    queries: Chunk
    keys: Chunk
    selection: Selection
    backwards: bool = False


def _kinds(selection: Spans, heads: int, kv_heads: int, device: torch.device) -> list[_Kind]:
    both = [x.expand(heads).tolist() for x in (selection.sinks, selection.window)]
    pairs = list(zip(*both))
    group = heads // kv_heads
    if any(len(set(pairs[i : i + group])) > 1 for i in range(0, heads, group)):
        found = "query heads of one key/value head see different tokens"
        raise BadInput(f"ring attention of {heads} query heads over {kv_heads}", found, "Let them see the same.")
    mine: dict[tuple[int, int], list[int]] = {}
    for head, pair in enumerate(pairs[::group]):
        mine.setdefault(pair, []).append(head)
    if len(mine) == 1:
        return [_Kind(None, None, *pair) for pair in mine]
    kinds = []
    for pair, some in mine.items():
        kv = torch.tensor(some)
        kinds.append(_Kind((kv[:, None] * group + torch.arange(group)).flatten().to(device), kv.to(device), *pair))
    return kinds


def pieces(queries: Chunk, keys: Chunk, sinks: int, window: int) -> Iterator[_Piece]:
    """What queries of one chunk of a text see of another, or of their own, as disjoint selections.

    A query at i sees the key at j  iff  j <= i  and  (j < sinks or i - j < window).
    """
    (q0, q1), (k0, k1) = queries, keys
    nq, nk, first = q1 - q0, k1 - k0, min(max(sinks - k0, 0), k1 - k0)
    if not nq or not nk or k0 > q0:
        return
    if k0 == q0:
        both = [torch.tensor([size]) for size in (first, min(window, max(nq, 1)))]
        yield _Piece((0, nq), (0, nk), Spans(sinks=both[0], window=both[1], queries=nq, keys=nk))
        return
    if first:
        yield _Piece((0, nq), (0, first), dense(nq, first, causal=False))
    if first < nk:
        yield from _band(nq, first, nk, q0 - k0 - window + 1)


def _band(nq: int, first: int, nk: int, edge: int) -> Iterator[_Piece]:
    """Query i sees the key j  iff  j >= i + edge, of the keys from `first` on.

    Read backwards, i' = nq - 1 - i and j' = nk - 1 - j, that is  j' <= i' + ahead: causal, for those queries that see
    some but not all.
    """
    ahead, many = nk - nq - edge, nk - first
    none = min(max(0, -ahead), nq)  # so many queries, from the back, see nothing
    some = min(max(none, many - 1 - ahead), nq)  # and those before so many see all
    if some > none:
        seen = some + ahead  # by the first of them
        selection = dense(some - none, seen)
        yield _Piece((nq - some, nq - none), (nk - seen, nk), selection, backwards=True)
    if some < nq:
        yield _Piece((0, nq - some), (first, nk), dense(nq - some, many, causal=False))


@dataclass(frozen=True)
class _Task:
    """All that is the same for every part."""

    kinds: Sequence[_Kind]
    layout: Layout
    scale: float
    softcap: float | None

    def parts(self, rank: int) -> Iterator[tuple[_Kind, _Piece]]:
        """What the queries here see of the tokens of a process; chunks of both counted from its own first token."""
        layout = self.layout
        for at, queries in _placed(layout.chunks(layout.rank)):
            for there, keys in _placed(layout.chunks(rank)):
                for kind in self.kinds:
                    for piece in pieces(queries, keys, kind.sinks, kind.window):
                        yield kind, replace(piece, queries=_moved(piece.queries, at), keys=_moved(piece.keys, there))

    def taken(self, q: Tensor, k: Tensor, v: Tensor, kind: _Kind, piece: _Piece) -> list[Tensor]:
        """What of the tensors a piece is about."""
        some = ((q, kind.heads, piece.queries), (k, kind.kv_heads, piece.keys), (v, kind.kv_heads, piece.keys))
        return [_taken(*each, piece) for each in some]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, piece: _Piece) -> tuple[Tensor, Tensor]:
        """Of one piece."""
        return attend(q, k, v, piece.selection, scale=self.scale, softcap=self.softcap)


def _placed(chunks: Sequence[Chunk]) -> list[tuple[int, Chunk]]:
    """Each chunk with where it begins among its process' tokens."""
    at, out = 0, []
    for first, last in chunks:
        out.append((at, (first, last)))
        at += last - first
    return out


def _moved(chunk: Chunk, by: int) -> Chunk:
    return chunk[0] + by, chunk[1] + by


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: _Task) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        for rank, (keys, values) in _passing([k, v], task.layout):
            for kind, piece in task.parts(rank):
                found = task.attend(*task.taken(q, keys, values, kind, piece), piece)
                _merge(out, lse, found, kind.heads, piece)
        ctx.task = task
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        task, wide = ctx.task, lse.dtype
        grad, out = grad.to(wide), out.to(wide)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        own = {"grad": grad, "out": out, "lse": lse}
        for rank, (keys, values, for_keys, for_values) in _passing([k, v, dk, dv], task.layout, changing=2):
            for kind, piece in task.parts(rank):
                found = _gradients(task, (q, keys, values), own, kind, piece)
                _add(dq, found[0], kind.heads, piece.queries, piece)
                _add(for_keys, found[1], kind.kv_heads, piece.keys, piece)
                _add(for_values, found[2], kind.kv_heads, piece.keys, piece)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _taken(x: Tensor, heads: Tensor | None, place: Chunk, piece: _Piece) -> Tensor:
    """Some heads and tokens, in the order of the piece."""
    x = x[:, :, slice(*place)]
    x = x if heads is None else x.index_select(1, heads)
    return x.flip(2) if piece.backwards else x


def _add(into: Tensor, x: Tensor, heads: Tensor | None, place: Chunk, piece: _Piece) -> None:
    """To what was there, in place."""
    x, into = (x.flip(2) if piece.backwards else x).to(into.dtype), into[:, :, slice(*place)]
    if heads is None:
        into += x
    else:
        into.index_add_(1, heads, x)


def _merge(
    out: Tensor, lse: Tensor, found: tuple[Tensor, Tensor], heads: Tensor | None, piece: _Piece
) -> None:
    """Put what came of a piece to what is there, in place."""
    more, its = (x.flip(2) if piece.backwards else x for x in found)
    out, lse = (x[:, :, slice(*piece.queries)] for x in (out, lse))
    before = [x if heads is None else x.index_select(1, heads) for x in (out, lse)]
    merged = merge_lse([before[0], more.to(out.dtype)], [before[1], its.to(lse.dtype)])
    for x, new in zip((out, lse), merged):
        if heads is None:
            x.copy_(new)
        else:
            x.index_copy_(1, heads, new)


def _gradients(
    task: _Task, inputs: tuple[Tensor, Tensor, Tensor], own: dict[str, Tensor], kind: _Kind, piece: _Piece
) -> tuple[Tensor, ...]:
    """Of the queries, keys and values of one piece, which is computed again.

    out = sum_i w_i out_i with w_i = exp(lse_i - lse), so that  d out_i = w_i d out  and
    d lse_i = w_i <d out, out_i - out>.
    """
    grad, out, lse = (_taken(own[name], kind.heads, piece.queries, piece) for name in ("grad", "out", "lse"))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in task.taken(*inputs, kind, piece)]
        part, its = task.attend(*leaves, piece)
    weight = torch.exp(its.detach() - lse)[..., None]
    d_part = (weight * grad).to(part.dtype)
    d_its = (weight * grad * (part.detach() - out)).sum(-1).to(its.dtype)
    return torch.autograd.grad((part, its), leaves, (d_part, d_its))


def _passing(
    mine: Sequence[Tensor], layout: Layout, changing: int = 0
) -> Iterator[tuple[int, list[Tensor]]]:
    """(whose, tensors) of every process in turn, one's own first. The next ones are on their way meanwhile.

    changing: so many of the last tensors are changed by who is given them; they are sent on afterwards, and home at
        last, where the caller's own are filled with what came back
    """
    rank, ranks = layout.rank, layout.ranks
    held, steady = [x.contiguous() for x in mine], len(mine) - changing
    for step in range(ranks):
        whose, coming = (rank - step) % ranks, (rank - step - 1) % ranks
        last = step == ranks - 1
        waiting, ahead = ([], []) if last else _send(held[:steady], layout, layout.counts[coming])
        yield whose, held
        if changing:
            more, changed = _send(held[steady:], layout, layout.counts[coming])
            waiting, ahead = waiting + more, ahead + changed
        for request in waiting:
            request.wait()
        held = ahead
    for x, back in zip(mine[steady:], held):
        x.copy_(back)


def _send(tensors: Sequence[Tensor], layout: Layout, count: int) -> tuple[list[Any], list[Tensor]]:
    """To the next process, and from the one before, which has so many tokens."""
    if layout.ranks == 1:
        return [], list(tensors)
    group, rank, ranks = layout.group, layout.rank, layout.ranks
    to, source = (dist.get_global_rank(group, i) if group else i for i in ((rank + 1) % ranks, (rank - 1) % ranks))
    got = [x.new_empty(*x.shape[:2], count, *x.shape[3:]) for x in tensors]
    each = [dist.P2POp(dist.isend, x, to, group) for x in tensors]
    each += [dist.P2POp(dist.irecv, x, source, group) for x in got]
    return dist.batch_isend_irecv(each), got
