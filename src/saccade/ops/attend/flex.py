"""Blocks and spans through PyTorch's FlexAttention, compiled for a CUDA device; forward and backward, with lse.

On a CPU it has neither a backward nor an lse, which are half of this op, so that it is no back end there. Its block
lists are honoured only where it is compiled, so that `mask_mod` says the whole selection once more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saccade.core.selection import Blocks, Selection, Spans

if TYPE_CHECKING:  # imported where it is used: it brings PyTorch's compiler, which takes seconds
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries and keys of a block where the selection names none; and the fewest queries that are worth it
LEAST_SIZE = 16  # of a head, for the kernel's products
FORMS = 1024  # compiled for different shapes and rules; PyTorch stops at 8 of a function, and all calls share this one

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def reasons(q: Tensor, v: Tensor, selection: Selection, softcap: float | None) -> list[str]:
    """Why it cannot compute this; [] means that it can."""
    out = []
    if q.device.type != "cuda":
        out.append(f"FlexAttention gives no gradient and no lse on a {q.device.type} device")
    if q.dtype == torch.float64:
        out.append("it computes in float32 at most, and the inputs are float64")
    if q.shape[2] < BLOCK:
        out.append(f"there are {q.shape[2]} queries; it takes {BLOCK} or more")
    gradients = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)
    if softcap is not None and q.dtype == torch.float32 and gradients:
        out.append("gradients in float32 under a softcap: theirs have more than twice PyTorch's rounding error")
    if min(q.shape[-1], v.shape[-1]) < LEAST_SIZE:
        out.append(f"heads of {min(q.shape[-1], v.shape[-1])}; it takes {LEAST_SIZE} or more")
    if isinstance(selection, Blocks):
        odd = [b for b in (selection.q_block, selection.k_block) if b % BLOCK]
        out += [f"blocks of {odd[0]}; its own are {BLOCK} wide"] if odd else []
    elif not isinstance(selection, Spans) or selection.grid or selection.dilation > 1 or not selection.causal:
        out.append(f"it takes blocks and causal spans; the selection is of {selection.kind}")
    return out


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
    import torch._dynamo
    from torch.nn.attention.flex_attention import AuxRequest

    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if softcap is not None:
        options["score_mod"] = _capped(softcap)
    mask = _blocks(selection, q.device) if isinstance(selection, Blocks) else _spans(selection, q.device)
    q, k, v = (x.contiguous() for x in (q, k, v))
    with torch._dynamo.config.patch(recompile_limit=FORMS, accumulated_recompile_limit=FORMS):
        out, aux = _compiled()(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True), **options)
    return out, aux.lse.float()


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)  # raises where it would go on uncompiled


def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _blocks(s: Blocks, device: torch.device) -> BlockMask:
    table = s.table().to(device)
    q0, q1, k0, k1 = edges(s, s.q_block, s.k_block, device)
    seen, whole = table, table
    if s.causal:
        seen, whole = table & (k0 < q1), table & (k1 <= q0 + 1)
    many_b, many_h = (int(n > 1) for n in table.shape[:2])
    qb, kb, offset, causal = s.q_block, s.k_block, s.offset, s.causal

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        listed = table[b * many_b, h * many_h, q // qb, k // kb]
        return listed & (k <= q + offset) if causal else listed

    return _mask(s, seen, whole, rule, (qb, kb))


def _spans(s: Spans, device: torch.device) -> BlockMask:
    sinks, window, seen, whole = span_tables(s, BLOCK, BLOCK, device)
    many, offset = int(len(sinks) > 1), s.offset

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        behind = q + offset - k
        return (behind >= 0) & ((behind < window[h * many]) | (k < sinks[h * many]))

    return _mask(s, seen, whole, rule, (BLOCK, BLOCK))


def span_tables(s: Spans, q_block: int, k_block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of causal spans: sinks and window of each head, and tables [1 h nqb nkb] of the blocks seen and seen whole."""
    sinks, window = (x.to(device).expand(max(len(s.sinks), len(s.window))).contiguous() for x in (s.sinks, s.window))
    q0, q1, k0, k1 = edges(s, q_block, k_block, device)
    n, w = (x[None, :, None, None] for x in (sinks, window))
    causal, sunk = k0 < q1, k0 < n  # of a block: some pair
    seen = causal & (sunk | (q0 - (k1 - 1) < w))
    whole = (k1 <= q0 + 1) & ((k1 <= n) | (q1 - 1 - k0 < w))
    return sinks, window, seen, whole


def edges(s: Selection, q_block: int, k_block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First row (as a key index) and the one after the last, of each query block [nqb 1]; of key blocks [nkb] alike."""
    q0 = torch.arange(0, s.queries, q_block, device=device)[:, None]
    k0 = torch.arange(0, s.keys, k_block, device=device)
    q1 = (q0 + q_block).clamp(max=s.queries)
    return q0 + s.offset, q1 + s.offset, k0, (k0 + k_block).clamp(max=s.keys)


def _mask(
    s: Selection,
    seen: Bool[Tensor, "b h nqb nkb"],
    whole: Bool[Tensor, "b h nqb nkb"],
    rule: Rule,
    size: tuple[int, int],
) -> BlockMask:
    """`seen`: blocks of which some pair is computed, `whole`: those of which every pair is."""
    from torch.nn.attention.flex_attention import BlockMask

    lists = [listed(seen & ~whole), listed(seen & whole)]
    (some, where), (full, at) = lists
    return BlockMask.from_kv_blocks(some, where, full, at, size, mask_mod=rule, seq_lengths=(s.queries, s.keys))


def listed(table: Bool[Tensor, "b h nqb nkb"]) -> tuple[Tensor, Tensor]:
    """How many of each row are set, and which: those first."""
    order = torch.argsort(table.int(), dim=-1, descending=True, stable=True)
    return table.sum(-1).int(), order.int()
