"""Attention whose weights are plain products of features: linear in the length, by sums over keys."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.selection import Gather

CHUNK = 64  # queries whose weights are written out at a time
SHORTER = 16  # lists this many times shorter than all keys are read key by key; longer ones by all products at once


def linear_attend(
    q: Float[Tensor, "b h q f"],
    k: Float[Tensor, "b g k f"],
    v: Float[Tensor, "b g k dv"],
    *,
    without: Gather | None = None,
    causal: bool = True,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """sum_j (q_i . k_j) v_j  and  sum_j q_i . k_j,  over all keys (causal: those up to the query's own, the last
    queries at the last keys), less the pairs of `without`. Query heads share key/value heads in order.

    Not divided by one another, since what is left may be merged with other parts. Sums are in float32 or better.
    Differentiable. Memory is that of the inputs and of the lists of some queries.

    without: lists only, of single queries, without ranges

    Raises:
        BadInput: shapes that do not fit together, or lists that are of no single queries.
    """
    _check(q, k, v, without)
    kind, (h, n), groups = torch.promote_types(q.dtype, torch.float32), q.shape[1:3], k.shape[1]
    q, k, v = q.to(kind), k.to(kind), torch.nn.functional.pad(v.to(kind), (0, 1), value=1.0)
    q, offset = rearrange(q, "b (g s) q f -> b g s q f", g=groups), k.shape[2] - n
    before = offset if causal else k.shape[2]
    sums, out = k[:, :, :before].mT @ v[:, :, :before], []
    for first in range(0, n, CHUNK):
        rows = q[:, :, :, first : first + CHUNK]
        part = rows @ sums[:, :, None]
        last = offset + first + rows.shape[3]
        if causal:
            keys, values = k[:, :, offset + first : last], v[:, :, offset + first : last]
            part = part + (rows @ keys[:, :, None].mT).tril() @ values[:, :, None]
            sums = sums + keys.mT @ values
        if without is not None:
            part = part - _listed(rows, k, v, _seen(without, first, h, groups, causal))
        out.append(part)
    whole = rearrange(torch.cat(out, 3), "b g s q d -> b (g s) q d")
    return whole[..., :-1], whole[..., -1]


def _seen(lists: Gather, first: int, heads: int, groups: int, causal: bool) -> Int[Tensor, "b g s r l"]:
    """The lists of some queries; -1 for what lies behind a query, and -1 stays -1."""
    index = lists.index[:, :, first : first + CHUNK].expand(-1, heads, -1, -1)
    if causal:
        at = lists.offset + first + torch.arange(index.shape[2], device=index.device)
        index = torch.where(index <= at[:, None], index, -1)
    return rearrange(index, "b (g s) r l -> b g s r l", g=groups)


def _listed(
    rows: Float[Tensor, "b g s r f"],
    k: Float[Tensor, "b g k f"],
    v: Float[Tensor, "b g k dv"],
    index: Int[Tensor, "b g s r l"],
) -> Float[Tensor, "b g s r dv"]:
    """The sums over lists."""
    (b, g, s, r, _), n = rows.shape, k.shape[2]
    index = index.expand(b, g, s, r, -1).long()
    if index.shape[-1] * SHORTER > n:
        there = torch.zeros(b, g, s, r, n + 1, dtype=torch.bool, device=k.device)
        there.scatter_(-1, torch.where(index >= 0, index, n), True)
        return (rows @ k[:, :, None].mT).masked_fill(~there[..., :n], 0.0) @ v[:, :, None]
    flat = index.clamp(min=0).flatten(2)[..., None]
    keys, values = (torch.take_along_dim(x, flat, 2).view(*index.shape, -1) for x in (k, v))
    weights = (keys @ rows[..., None])[..., 0].masked_fill(index < 0, 0.0)
    return (weights[..., None, :] @ values)[..., 0, :]


def _check(q: Tensor, k: Tensor, v: Tensor, without: Gather | None) -> None:
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0]
    if not fits or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        do = "Give [batch, heads, tokens, features], the last queries of the keys."
        raise BadInput("linear attention", f"{found} do not fit together", do)
    if without is None:
        return
    other = (without.queries, without.keys) != (q.shape[2], k.shape[2])
    if without.q_block != 1 or without.ranges is not None or other:
        found = f"lists for blocks of {without.q_block} of {without.queries} queries over {without.keys} keys"
        do = "Give a list for each single query of these tensors, without ranges, each key once."
        raise BadInput(f"linear attention of {q.shape[2]} queries over {k.shape[2]} keys", found, do)
