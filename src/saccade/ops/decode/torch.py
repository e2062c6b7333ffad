"""Decoding in plain torch: few queries all at once, many by tiles."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.selection import Gather, Pairs, Selection, causal_mask, dense
from saccade.ops.attend import torch as tiled
from saccade.ops.attend.reference import exponentials
from saccade.ops.attend.rows import FEW, gathered


def decode(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    index: Int[Tensor, "b h q l"] | None,
    visible: Bool[Tensor, "b h q k"] | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """See the op's api."""
    options = {"scale": scale, "softcap": softcap}
    queries, keys = q.shape[2], k.shape[2]
    if queries > FEW or tiled.needs_grad(q, k, v):
        return tiled.attend(q, k, v, selection(queries, keys, index, visible), **options)
    if index is not None:
        return gathered(q, k, v, index, visible, **options)
    mask = None if queries == 1 else causal_mask(queries, keys, q.device)[None, None]
    if visible is not None:
        mask = visible if mask is None else mask & visible
    return _few(q, k, v, mask, **options)


def _few(
    q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "b h q k"] | None, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As the oracle computes it, in as few calls as it takes: the work is small, each call costs the host."""
    wide, g = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    logits = q.to(wide).unflatten(1, (g, -1)).flatten(2, 3) @ k.to(wide).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:  # no row is empty
        weights = logits.softmax(-1)
        lse = logits.amax(-1) - weights.amax(-1).log()  # the largest weight is exp(max - lse)
    else:
        by_head = logits.view(*q.shape[:3], -1).masked_fill(~mask, -torch.inf)
        weights, lse = exponentials(by_head)
        weights = weights.view_as(logits)
    return (weights @ v.to(wide)).view(*q.shape[:3], -1).to(q.dtype), lse.view(q.shape[:3])


def selection(queries: int, keys: int, index: Tensor | None, visible: Tensor | None) -> Selection:
    """What is decoded, as a selection: the meaning of the op."""
    shape = {"queries": queries, "keys": keys}
    if index is None:
        return dense(queries, keys) if visible is None else Pairs(allowed=visible, **shape)
    lists = Gather(index=index.int(), **shape)
    return lists if visible is None else Pairs(allowed=lists.mask() & visible, **shape)


def again(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    index: Int[Tensor, "b g m"],
    tokens: Int[Tensor, "b g m"],
    visible: Bool[Tensor, "b h q k"] | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """Attention to keys that stand for several tokens, for all of these but one: logits + log(tokens - 1).

    Merged with attention that counts every key once, it makes each count as often as it has tokens.
    """
    kind, g = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    at = index.long()[..., None]
    keys, values = (x.gather(2, at.expand(-1, -1, -1, x.shape[-1]))[:, :, None] for x in (k, v))
    logits = q.unflatten(1, (g, -1)).to(kind) @ keys.to(kind).mT * scale  # [b g s q m]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + (tokens - 1).to(kind).log()[:, :, None, None]
    if q.shape[2] > 1:  # a single query is behind every key
        last = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
        logits = logits.masked_fill((index[:, :, None] > last)[:, :, None], -torch.inf)
    if visible is not None:
        seen = visible.expand(*q.shape[:3], -1).unflatten(1, (g, -1))
        seen = seen.gather(-1, index.long()[:, :, None, None].expand(*seen.shape[:-1], -1))
        logits = logits.masked_fill(~seen, -torch.inf)
    if index.shape[-1] == 1:  # all the weight is on one key: no softmax
        out, lse = values.expand(*logits.shape[:-1], -1), logits[..., 0]
    else:
        weights, lse = exponentials(logits)
        out = weights @ values.to(kind)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)
