"""Attention tile by tile in plain torch: gather the keys, two products, a softmax between. Bounded memory, both ways.

For a tile with logits S (base 2):  P = 2^S / rowsum(2^S),  out = P V;  backwards P is computed again:
dV += P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP) + dlse),  dQ = scale dS K,  dK += scale dS^T Q.
On the CPU two Python threads with one core each beat one loop with two: the products are too small to be split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from saccade.core.selection import Gather, Selection
from saccade.ops.attend.rows import FEW, gathered
from saccade.ops.attend.tiles import ROWS, Share, Tile, shares

LOG2E = math.log2(math.e)
CHUNK = 1024  # queries in a job: small enough that the threads end together
ALONE = 1 << 21  # pairs below which a thread costs more than it gives


@dataclass(frozen=True)
class Logits:
    """How logits are made; in base 2, because torch has a fast 2^x on CPUs and a slow e^x."""

    scale: float
    softcap: float | None

    def __call__(self, q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:
        """[r n], before anything is hidden. The product scales its sums: scaled queries would be rounded once more."""
        s = buffer[: len(q) * len(k)].view(len(q), len(k))
        if self.softcap is None:
            return torch.addmm(s, q, k.T, beta=0, alpha=self.scale * LOG2E, out=s)
        return torch.addmm(s, q, k.T, beta=0, alpha=self.scale / self.softcap, out=s).tanh_().mul_(self.softcap * LOG2E)

    def slope(self, s: Tensor) -> Tensor | float:
        """d logits / d (scale q k^T), from the logits: 1 - tanh^2."""
        return 1.0 if self.softcap is None else 1.0 - (s / (self.softcap * LOG2E)).square()


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
    return _Attend.apply(q, k, v, selection, Logits(scale, softcap))  # type: ignore[return-value]


def needs_grad(*tensors: Tensor) -> bool:
    """True if autograd will ask for gradients."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _few_lists(s: Selection) -> TypeGuard[Gather]:
    return isinstance(s, Gather) and s.q_block == 1 and s.ranges is None and s.causal and s.queries <= FEW


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, selection: Selection, logits: Logits):
        ctx.work = shares(selection, q.shape[0], q.shape[1], k.shape[1])
        ctx.logits = logits
        out, lse = _forward(q, k, v, ctx.work, logits)
        ctx.save_for_backward(q, k, v)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor):  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        return (*_backward(q, k, v, d_out, d_lse, ctx.work, ctx.logits), None, None)


# --- forward --------------------------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, work: list[Share], logits: Logits) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # PyTorch's kernel does not look
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=wide(q))
    sparse = [s for s in work if not _flash(q, k, v, s, logits, out, lse)]
    if not sparse:
        return out, lse
    k, v = k.to(wide(k)), v.to(wide(v))
    jobs = [(s, a, min(a + c, q.shape[2])) for s in sparse for c in [_chunk(s)] for a in range(0, q.shape[2], c)]

    def job(task: tuple[Share, int, int]) -> None:
        share, first, last = task
        b, g, heads = share.batch, share.kv_head, share.heads
        rows, buffer = q[b, heads, first:last], _Buffer(k)
        for tile in share.tiles(first, last):
            mine = rows[:, tile.start - first : tile.stop - first].flatten(0, 1).to(k.dtype)
            o, e = _tile_forward(mine, k[b, g], v[b, g], tile, logits, buffer)
            out[b, heads, tile.start : tile.stop] = o.view(len(rows), -1, o.shape[-1]).to(out.dtype)
            lse[b, heads, tile.start : tile.stop] = e.view(len(rows), -1)

    _in_threads(job, sorted(jobs, key=lambda j: -j[2]), q)
    return out, lse


def _chunk(share: Share) -> int:
    """Queries in a job: about CHUNK, whole query blocks."""
    return -(-CHUNK // share.q_block) * share.q_block


def _flash(q: Tensor, k: Tensor, v: Tensor, share: Share, logits: Logits, out: Tensor, lse: Tensor) -> bool:
    """Dense heads go to PyTorch's own kernel, which gives lse too; False where it cannot."""
    square = q.shape[2] == k.shape[2] or not share.selection.causal  # its causality counts from the first key
    if logits.softcap is not None or q.device.type != "cpu" or not square or not share.dense or not q.shape[2]:
        return False
    if q.shape[-1] != v.shape[-1]:
        return False
    b, g, heads = share.batch, share.kv_head, share.heads
    keys, values = (x[b : b + 1, g : g + 1].expand(-1, len(share.members), -1, -1) for x in (k, v))
    o, e = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[b : b + 1, heads], keys, values, 0.0, share.selection.causal, scale=logits.scale
    )
    out[b, heads], lse[b, heads] = o[0], e[0].to(lse.dtype)
    return True


def _tile_forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, logits: Logits, buffer: _Buffer
) -> tuple[Tensor, Tensor]:
    """Output [r dv] and natural lse [r] of one tile."""
    if not tile.size:
        return q.new_zeros(len(q), v.shape[-1]), q.new_full((len(q),), -torch.inf)
    s = logits(q, _take(k, tile.keys), buffer.of(len(q) * tile.size))
    _hide(s, tile)
    p, top, total = _exponentials(s)
    out = torch.mm(p, _take(v, tile.keys)).div_(total.clamp(min=torch.finfo(s.dtype).tiny))
    return out, top.add_(total.log2_()).div_(LOG2E)[:, 0]


def _exponentials(s: Float[Tensor, "r n"]) -> tuple[Tensor, Tensor, Tensor]:
    """2^(s - top) in the place of s, the largest logit of each row and the sum; all 0, finite, 0 if it sees nothing."""
    top = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
    p = s.sub_(top).exp2_()
    return p, top, p.sum(-1, keepdim=True)


def _take(x: Float[Tensor, "k d"], keys: slice | Tensor) -> Tensor:
    return x[keys] if isinstance(keys, slice) else x.index_select(0, keys.to(x.device))


def _hide(s: Float[Tensor, "r n"], tile: Tile) -> None:
    if tile.hidden is not None:
        rows, tail = tile.hidden.shape
        s.view(-1, rows, s.shape[1])[:, :, -tail:].masked_fill_(tile.hidden.to(s.device), -torch.inf)


class _Buffer:
    """Memory that tiles of different sizes use in turn."""

    def __init__(self, like: Tensor):
        self.memory = like.new_empty(0)

    def of(self, size: int) -> Tensor:
        if len(self.memory) < size:
            self.memory = self.memory.new_empty(size + size // 4)
        return self.memory


# --- backward -------------------------------------------------------------------------------------------------------


def _backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, d_lse: Tensor, work: list[Share], logits: Logits
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind = wide(q)
    dq, dk, dv = (torch.zeros(x.shape, device=x.device, dtype=kind) for x in (q, k, v))
    whole = [x.to(kind) for x in (q, k, v, d_out)]

    def job(mine: list[Share]) -> None:
        buffers = _Buffer(dk), _Buffer(dk)
        for share in mine:
            b, g, heads = share.batch, share.kv_head, share.heads
            rows = [x[b, heads] for x in (whole[0], whole[3], d_lse)]
            sums = dk[b, g], dv[b, g]
            for tile in share.tiles(0, q.shape[2]):
                here = [x[:, tile.start : tile.stop].flatten(0, 1) for x in rows]
                part = _tile_backward(here, whole[1][b, g], whole[2][b, g], sums, tile, logits, buffers)
                dq[b, heads, tile.start : tile.stop] = part.view(len(share.members), -1, part.shape[-1])

    groups: dict[tuple[int, int], list[Share]] = {}
    for share in work:  # one thread for all that add to the same keys
        groups.setdefault((share.batch, share.kv_head), []).append(share)
    _in_threads(job, list(groups.values()), q)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _tile_backward(
    rows: Sequence[Tensor], k: Tensor, v: Tensor, sums: tuple[Tensor, Tensor], tile: Tile, logits: Logits,
    buffers: tuple[_Buffer, _Buffer],
) -> Tensor:  # fmt: skip
    """dq of one tile; its dk and dv are added to `sums`."""
    q, d_out, d_lse = rows
    if not tile.size:
        return torch.zeros_like(q)
    keys, values = _take(k, tile.keys), _take(v, tile.keys)
    size = len(q) * tile.size
    s = logits(q, keys, buffers[0].of(size))
    slope = logits.slope(s)
    _hide(s, tile)
    p, _, total = _exponentials(s)  # not 2^(s - lse): the rounding of lse would be in all of the row
    p.div_(total.clamp_(min=torch.finfo(s.dtype).tiny))
    _add(sums[1], tile.keys, p.T, d_out)
    d_p = torch.mm(d_out, values.T, out=buffers[1].of(size)[:size].view(len(q), -1))
    d_s = d_p.mul_(p)
    delta = d_s.sum(-1) - d_lse  # not from out: where a row sees one key this cancels exactly
    d_s.sub_(p.mul_(delta[:, None])).mul_(slope)
    _add(sums[0], tile.keys, d_s.T, q * logits.scale)
    return torch.mm(d_s, keys).mul_(logits.scale)


def _add(total: Tensor, keys: slice | Tensor, a: Tensor, b: Tensor) -> None:
    """total[keys] += a b; no key is listed twice."""
    if isinstance(keys, slice):
        total[keys].addmm_(a, b)
    else:
        total.index_add_(0, keys.to(total.device), torch.mm(a, b))


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
