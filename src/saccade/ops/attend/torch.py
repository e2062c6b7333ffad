"""Attention tile by tile in plain torch: gather the keys, two products, a softmax between. Bounded memory, both ways.

For a tile with logits S:  P = e^S / rowsum(e^S),  out = P V;  backwards P is computed again:
dV += P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP) + dlse),  dQ = scale dS K,  dK += scale dS^T Q.
Small tiles of one shape go together, since a call costs as much as a small product. On the CPU two Python threads with
one core each beat one loop with two: the products are too small to be split.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from saccade.core.selection import Buckets, Gather, Selection
from saccade.ops.attend import fused, reference
from saccade.ops.attend.rows import FEW, gathered
from saccade.ops.attend.tiles import ROWS, Batch, Share, Sorted, batches, shares

LOG2E = math.log2(math.e)
CHUNK = 1024  # queries in a job: small enough that the threads end together
ALONE = 1 << 21  # pairs below which a thread costs more than it gives


@dataclass(frozen=True)
class Logits:
    """How logits are made."""

    scale: float
    softcap: float | None

    def __call__(self, q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:
        """[t r n], nothing hidden yet. The product scales its sums: scaled queries would be rounded once more."""
        s = buffer.view(*q.shape[:2], k.shape[1])
        if self.softcap is None:
            return torch.baddbmm(s, q, k.mT, beta=0, alpha=self.scale, out=s)
        torch.baddbmm(s, q, k.mT, beta=0, alpha=self.scale / self.softcap, out=s)
        return s.tanh_().mul_(self.softcap)

    def slope(self, s: Tensor) -> Tensor | float:
        """d logits / d (scale q k^T), from the logits: 1 - tanh^2."""
        return 1.0 if self.softcap is None else 1.0 - (s / self.softcap).square()


def wide(x: Tensor) -> torch.dtype:
    """What is accumulated in."""
    return torch.promote_types(x.dtype, torch.float32)


def attend(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    selection: Selection,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """softmax over the selected pairs, and lse; differentiable in q, k, v through both."""
    if _few_lists(selection) and not needs_grad(q, k, v):
        return gathered(q, k, v, selection.index, None, scale=scale, softcap=softcap)
    if isinstance(selection, Buckets):
        return _by_bucket(q, k, v, selection, Logits(scale, softcap))
    return _Attend.apply(q, k, v, selection, Logits(scale, softcap))  # type: ignore[return-value]


def _by_bucket(q: Tensor, k: Tensor, v: Tensor, selection: Buckets, logits: Logits) -> tuple[Tensor, Tensor]:
    """Queries and keys brought into the order of their buckets, and back: tiles then read ranges of keys."""
    places = selection.places()
    b, h, n, _ = q.shape
    group = h // k.shape[1]
    if places.k_order.shape[1] > 1 and group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    q_order = places.q_order.long().expand(b, h, n)[..., None]
    k_order = places.k_order.long().expand(*k.shape[:2], -1)[..., None]
    k, v = (torch.take_along_dim(x, k_order, 2) for x in (k, v))
    shape = {"queries": n, "keys": k.shape[2], "causal": False}
    out, lse = _Attend.apply(torch.take_along_dim(q, q_order, 2), k, v, Sorted(places=places, **shape), logits)  # type: ignore[misc]
    back = q_order.argsort(2)
    return torch.take_along_dim(out, back, 2), lse.gather(2, back[..., 0])


def needs_grad(*tensors: Tensor) -> bool:
    """True if autograd will ask for gradients."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _few_lists(s: Selection) -> TypeGuard[Gather]:
    return isinstance(s, Gather) and s.q_block == 1 and s.ranges is None and s.causal and s.queries <= FEW


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, selection: Selection, logits: Logits):
        ctx.logits, ctx.selection = logits, selection
        ctx.set_materialize_grads(False)
        out, lse, whole = _forward(q, k, v, selection, logits)
        ctx.save_for_backward(q, k, v, *((out, lse) if whole and q.dtype == wide(q) else ()))
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None):  # type: ignore[override]
        q, k, v, *found = ctx.saved_tensors
        d_out = q.new_zeros(*q.shape[:3], v.shape[-1]) if d_out is None else d_out
        finite = bool(found) and all(bool(d.sum().isfinite()) for d in (d_out, d_lse) if d is not None)
        if finite and d_lse is None:  # PyTorch's kernel loses a NaN
            given = (*found, d_out, ctx.selection, ctx.logits.scale)
            return (*fused.together_backward(q, k, v, *given), None, None)
        if finite and fused.few(q.shape[2], k.shape[2]):  # it has no gradient for lse
            return (*_through_reference(q, k, v, d_out, d_lse, ctx.selection, ctx.logits.scale), None, None)
        d_lse = q.new_zeros(q.shape[:3], dtype=wide(q)) if d_lse is None else d_lse
        work = shares(ctx.selection, q.shape[0], q.shape[1], k.shape[1])
        return (*_backward(q, k, v, d_out, d_lse, work, ctx.logits), None, None)


def _through_reference(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, d_lse: Tensor | None, selection: Selection, scale: float
) -> tuple[Tensor, ...]:
    """Gradients of few pairs, all under one mask."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        found = reference.masked(*inputs, selection.mask(), scale=scale)
        return torch.autograd.grad(found, inputs, (d_out, d_lse))


# --- forward --------------------------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection, logits: Logits) -> tuple[Tensor, Tensor, bool]:
    """Output and lse, and whether `fused.together` made them."""
    by_token = q.transpose(1, 2).is_contiguous()  # as models lay them out: neither queries nor output need a copy
    q = q if by_token else q.contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))  # PyTorch's kernel does not look
    out = _flipped(q.new_empty(*_flipped(q, by_token).shape[:3], v.shape[-1]), by_token)
    lse = _flipped(q.new_empty(_flipped(q, by_token).shape[:3], dtype=wide(q)), by_token)
    # PyTorch's kernel loses a NaN under a mask
    usual = fused.can(q, logits.softcap) and all(bool(x.sum().isfinite()) for x in (q, k, v))
    if usual and fused.together(q, k, v, selection, logits.scale, out, lse):
        return out, lse, True
    usual &= q.shape[-1] == v.shape[-1]
    work = shares(selection, q.shape[0], q.shape[1], k.shape[1])
    sparse = [s for s in work if not (usual and fused.whole(q, k, v, s, logits.scale, out, lse))]
    if not sparse:
        return out, lse, False
    both = torch.cat([k, v], -1).flatten(0, 2)  # copied together, by whole lines of the cache
    both, sizes = both.to(both.dtype if usual else wide(both)), (k.shape[-1], v.shape[-1])
    queries, out_rows, lse_rows = (_flipped(x, by_token).flatten(0, 2) for x in (q, out, lse))
    ranges = [(a, min(a + c, q.shape[2])) for c in [_chunk(sparse)] for a in range(0, q.shape[2], c)]
    cores = torch.get_num_threads()
    jobs = [(sparse[i::cores], *some) for some in ranges for i in range(min(cores, len(sparse)))]

    def job(task: tuple[list[Share], int, int]) -> None:
        buffer = _Buffer(both)
        for batch in batches(*task):
            rows, index, (share, tile) = _rows(batch, q, by_token), _keys(batch, k), batch[0]
            mine = _take(queries, rows, len(share.members) * (tile.stop - tile.start)).to(both.dtype)
            here, values_here = _take(both, index, tile.size).split(sizes, -1)
            if not tile.size:
                o, e = mine.new_zeros(*mine.shape[:2], v.shape[-1]), mine.new_full(mine.shape[:2], -torch.inf)
            elif usual:
                o, e = _fused_forward(mine, here, values_here, batch, logits.scale)
            else:
                o, e = _batch_forward(mine, here, values_here, batch, logits, buffer)
            _put(out_rows, rows, o)
            _put(lse_rows, rows, e)

    _in_threads(job, sorted(jobs, key=lambda j: -j[2]), q)
    return out, lse, False


def _chunk(shares: Sequence[Share]) -> int:
    """Queries in a job: about CHUNK, whole query blocks of all."""
    block = math.lcm(*{share.q_block for share in shares})
    return -(-CHUNK // block) * block


def _flipped(x: Float[Tensor, "b h q ..."], by_token: bool) -> Float[Tensor, "b q h ..."]:
    """Heads and queries exchanged, or not."""
    return x.transpose(1, 2) if by_token else x


def _rows(batch: Batch, q: Float[Tensor, "b h q d"], by_token: bool = False) -> slice | Int[Tensor, " m"]:
    """The rows of all tiles, one after the other, in [b h q] flattened, or in [b q h]."""
    pieces = [x for share, tile in batch for x in share.rows(tile, q.shape[1], q.shape[2], by_token)]
    return _joined(pieces, q.device)


def _keys(batch: Batch, k: Float[Tensor, "b g k d"]) -> slice | Int[Tensor, " m"]:
    """The keys of all tiles, one after the other, in [b g k] flattened."""
    return _joined([share.keys(tile, k.shape[1], k.shape[2]) for share, tile in batch], k.device)


def _joined(pieces: Sequence[slice | np.ndarray], device: torch.device) -> slice | Int[Tensor, " m"]:
    """One index for all; a slice as it is, which need not be copied."""
    if len(pieces) == 1 and isinstance(pieces[0], slice):
        return pieces[0]
    whole = [np.arange(x.start, x.stop, x.step) if isinstance(x, slice) else x for x in pieces]
    return torch.from_numpy(np.concatenate(whole)).to(device)


def _take(x: Float[Tensor, "k d"], index: slice | Int[Tensor, " m"], size: int) -> Float[Tensor, "t n d"]:
    """Rows of x, in tiles of `size`."""
    some = x[index] if isinstance(index, slice) else x.index_select(0, index)
    return some.unflatten(0, (-1, size)) if size else some[None]


def _put(x: Float[Tensor, "k ..."], index: slice | Int[Tensor, " m"], values: Float[Tensor, "t r ..."]) -> None:
    """Write rows where `_take` reads them."""
    flat = values.flatten(0, 1).to(x.dtype)
    if isinstance(index, slice):
        x[index] = flat
    else:
        x.index_copy_(0, index, flat)


def _fused_forward(
    q: Float[Tensor, "t r d"], k: Float[Tensor, "t n d"], v: Float[Tensor, "t n d"], batch: Batch, scale: float
) -> tuple[Float[Tensor, "t r d"], Float[Tensor, "t r"]]:
    """Output and lse of tiles of one shape, by PyTorch's kernel."""
    heads, hidden = len(batch[0][0].members), _hidden(batch)
    q = q.unflatten(1, (heads, -1))
    k, v = (x[:, None].expand(-1, heads, -1, -1) for x in (k, v))
    mask = None
    if hidden is not None and len(hidden) == 1 and hidden.shape[-1] < k.shape[2]:  # the same for many tiles
        added = _added(batch[0][1].hidden, 1 << k.shape[2].bit_length(), q.dtype)
        mask = added[:, added.shape[1] - k.shape[2] :].expand(len(batch), heads, -1, -1)
    elif hidden is not None:
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        mask = torch.nn.functional.pad(mask, (k.shape[2] - hidden.shape[-1], 0))[:, None]
        mask = mask.expand(len(batch), heads, -1, -1)
    out, lse = fused.kernel(q, k, v, mask, False, scale)
    if hidden is not None and hidden.shape[-1] == k.shape[2]:  # where a row sees nothing the kernel says 0
        lse = lse.masked_fill(hidden.all(-1)[:, None], -torch.inf)
    return out.flatten(1, 2), lse.flatten(1, 2)


@functools.lru_cache(maxsize=8)
def _added(hidden: Bool[Tensor, "r tail"], size: int, dtype: torch.dtype) -> Float[Tensor, "r n"]:
    """What is added to the logits of `size` keys, the last of which are hidden; fewer keys take its last columns."""
    mask = torch.zeros(len(hidden), size, dtype=dtype)
    mask[:, size - hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
    return mask


def _batch_forward(
    q: Float[Tensor, "t r d"], k: Float[Tensor, "t n d"], v: Float[Tensor, "t n dv"], batch: Batch, logits: Logits,
    buffer: _Buffer,
) -> tuple[Float[Tensor, "t r dv"], Float[Tensor, "t r"]]:  # fmt: skip
    """Output and lse of tiles of one shape."""
    s = logits(q, k, buffer.of(q.shape[0] * q.shape[1] * k.shape[1]))
    _hide(s, batch)
    p, top, total = _exponentials(s)
    out = torch.bmm(p, v).div_(total.clamp(min=torch.finfo(s.dtype).tiny))
    return out, top.add_(total.log_())[..., 0]


def _exponentials(s: Float[Tensor, "t r n"]) -> tuple[Tensor, Tensor, Tensor]:
    """e^(s - top) in the place of s, the largest logit of each row and the sum; all 0, finite, 0 if it sees nothing.

    As a power of two, which torch computes several times as fast on a CPU; the factor comes after the difference, where
    its rounding costs least.
    """
    top = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
    p = s.sub_(top).mul_(LOG2E).exp2_()
    return p, top, p.sum(-1, keepdim=True)


def _hidden(batch: Batch) -> Bool[Tensor, "t r tail"] | None:
    """What rows may not see of each tile's last keys; one for all where it is the same."""
    masks = [tile.hidden for _, tile in batch if tile.hidden is not None]
    if not masks:
        return None
    return masks[0][None] if all(m is masks[0] for m in masks) else torch.stack(masks)


def _hide(s: Float[Tensor, "t r n"], batch: Batch) -> None:
    hidden = _hidden(batch)
    if hidden is not None:
        _, rows, tail = hidden.shape
        s.unflatten(1, (-1, rows))[..., -tail:].masked_fill_(hidden[:, None].to(s.device), -torch.inf)


class _Buffer:
    """Memory that tiles of different sizes use in turn."""

    def __init__(self, like: Tensor):
        self.memory = like.new_empty(0)

    def of(self, size: int) -> Tensor:
        if len(self.memory) < size:
            self.memory = self.memory.new_empty(size + size // 4)
        return self.memory[:size]


# --- backward -------------------------------------------------------------------------------------------------------


def _backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, d_lse: Tensor, work: list[Share], logits: Logits
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind = wide(q)
    dq, dk, dv = (torch.zeros(x.shape, device=x.device, dtype=kind) for x in (q, k, v))
    queries, keys, values, outs, lses = (x.to(kind).flatten(0, 2) for x in (q, k, v, d_out, d_lse))
    sums, dq_rows = (dk.flatten(0, 2), dv.flatten(0, 2)), dq.flatten(0, 2)

    def job(mine: list[Share]) -> None:
        buffers = _Buffer(dk), _Buffer(dk)
        for batch in batches(mine, 0, q.shape[2]):
            rows = _rows(batch, q)
            each = len(batch[0][0].members) * (batch[0][1].stop - batch[0][1].start)
            here = [_take(x, rows, each) for x in (queries, outs, lses)]
            part = _batch_backward(here, keys, values, sums, _keys(batch, k), batch, logits, buffers)
            _put(dq_rows, rows, part)

    _in_threads(job, _by_kv_head(work), q)  # one thread for all that add to the same keys
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _by_kv_head(shares: Sequence[Share]) -> list[list[Share]]:
    """Those that read the same keys and values together."""
    groups: dict[tuple[int, int], list[Share]] = {}
    for share in shares:
        groups.setdefault((share.batch, share.kv_head), []).append(share)
    return list(groups.values())


def _batch_backward(
    rows: Sequence[Tensor], k: Tensor, v: Tensor, sums: tuple[Tensor, Tensor], index: slice | Tensor, batch: Batch,
    logits: Logits, buffers: tuple[_Buffer, _Buffer],
) -> Float[Tensor, "t r d"]:  # fmt: skip
    """dq of tiles of one shape; their dk and dv are added to `sums`."""
    q, d_out, d_lse = rows
    size = batch[0][1].size
    if not size:
        return torch.zeros_like(q)
    keys, values = _take(k, index, size), _take(v, index, size)
    many = q.shape[0] * q.shape[1] * size
    s = logits(q, keys, buffers[0].of(many))
    slope = logits.slope(s)
    _hide(s, batch)
    p, _, total = _exponentials(s)  # not e^(s - lse): the rounding of lse would be in all of the row
    p.div_(total.clamp_(min=torch.finfo(s.dtype).tiny))
    heads = len(batch[0][0].members)
    _add(sums[1], index, p, d_out, heads)
    d_p = torch.bmm(d_out, values.mT, out=buffers[1].of(many).view_as(p))
    d_s = d_p.mul_(p)
    delta = d_s.sum(-1) - d_lse  # not from out: where a row sees one key this cancels exactly
    d_s.sub_(p.mul_(delta[..., None])).mul_(slope)
    _add(sums[0], index, d_s, q * logits.scale, heads)
    return torch.bmm(d_s, keys).mul_(logits.scale)


def _add(total: Float[Tensor, "k d"], index: slice | Tensor, a: Tensor, b: Float[Tensor, "t r d"], heads: int) -> None:
    """total[index] += a^T b. Each query head is summed by itself: shorter sums round less."""
    a, b = (x.unflatten(1, (heads, -1)) for x in (a, b))
    more = torch.matmul(a.mT, b).sum(1)
    if isinstance(index, slice):
        total[index] += more[0]
    else:
        total.index_add_(0, index, more.flatten(0, 1))


# --- threads --------------------------------------------------------------------------------------------------------


def _in_threads(job: Callable[[Any], None], tasks: Sequence[Any], like: Tensor) -> None:
    """job(task) for each, on as many threads as torch may use, one core each. Small work stays in this one."""
    cores = torch.get_num_threads()
    few = like.shape[0] * like.shape[1] * like.shape[2] * ROWS < ALONE
    if like.device.type != "cpu" or cores == 1 or len(tasks) < 2 or few:
        for task in tasks:
            job(task)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(task: Any) -> None:
        torch.set_num_threads(1)  # of this thread
        with torch.inference_mode(inference), torch.no_grad():
            job(task)

    try:
        with ThreadPoolExecutor(min(cores, len(tasks))) as pool:
            list(pool.map(alone, tasks))
    finally:
        torch.set_num_threads(cores)  # what new threads start with
