"""A learnt guess at the attention map by blocks: from pooled queries and keys, as they are before their rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.site import Turn
from saccade.ops import dispatch
from saccade.ops.attend.api import check


class Gate(NamedTuple):
    """The weights of one layer: `keys` of the pooled keys (largest, least, mean); `queries` None: as they are.

    With queries [h d e] the keys are projected once for each of their own heads, [g 3d e]; without, once for each
    query head, [h 3d d].
    """

    keys: Float[Tensor, "h|g 3d e"]
    queries: Float[Tensor, "h d e"] | None = None


class Pooled(NamedTuple):
    """What a gate sees of one layer: blocks of queries and keys without their rotation, and where they begin."""

    queries: Float[Tensor, "b h nqb d"]
    keys: Float[Tensor, "b g nkb 3d"]
    query_start: Int[Tensor, " nqb"]
    key_start: Int[Tensor, " nkb"]


def block_gate(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    gate: Gate,
    turn: Turn,
    *,
    block: int,
    first: int = 0,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> Float[Tensor, "b h nqb nkb"]:
    """How much each block of queries is thought to want each block of keys: logits, float32 or better.

    q, k: after their rotation, the queries being the last of the keys
    turn: how the model rotates, as `Site.turn`
    first: position of the first key
    impl: "auto", "torch"
    report: is told which back end ran, as "block_gate:torch"

    Raises:
        BadInput: shapes that do not fit together, or an empty block.
    """
    dispatch.pick("block_gate", impl, {"torch": list}, report)
    return gate_logits(pool_for_gate(q, k, turn, block, first), gate, turn)


def pool_for_gate(
    q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], turn: Turn, block: int, first: int = 0
) -> Pooled:
    """Mean queries; largest, least and mean keys of each block of `block` tokens, the last of those it has.

    Raises:
        BadInput: queries and keys that do not fit together, or an empty block.
    """
    check(q, k, k)
    if block < 1 or q.shape[2] > k.shape[2]:
        asked = f"a gate over {q.shape[2]} queries and {k.shape[2]} keys in blocks of {block}"
        raise BadInput(asked, "queries are the last of the keys, and a block holds one", "Give all keys.")
    kind = torch.promote_types(q.dtype, torch.float32)
    at = first + torch.arange(k.shape[2], device=q.device)
    start = at[k.shape[2] - q.shape[2] :: block]
    mean = turn(_mean_queries(q, turn, block).to(kind), -start)
    bare = turn(k, -at)
    whole = bare.shape[2] - bare.shape[2] % block
    parts = [bare[:, :, :whole].unflatten(2, (whole // block, block)), bare[:, :, None, whole:]]
    stats = [torch.cat([x.amax(3), x.amin(3), x.mean(3)], -1) for x in parts if x.numel()]
    return Pooled(mean, torch.cat(stats, 2).to(kind), start, at[::block])


def _mean_queries(q: Float[Tensor, "b h n d"], turn: Turn, block: int) -> Float[Tensor, "b h nqb d"]:
    """Means over blocks of queries turned back to the first position of their block.

    A rotation is linear, so that turning back and adding up is one product: sum_j q_j R_-j. The queries are read once.
    """
    b, h, n, d = q.shape
    units = torch.eye(d, dtype=q.dtype, device=q.device)[None, :, None].expand(1, d, block, d)
    back = turn(units, -torch.arange(block, device=q.device))[0].transpose(0, 1).reshape(block * d, d)
    whole, rest = n - n % block, n % block
    parts = [q[:, :, :whole].reshape(b, h, whole // block, block * d) @ back / block]
    if rest:
        parts.append(q[:, :, whole:].reshape(b, h, 1, rest * d) @ back[: rest * d] / rest)
    return torch.cat(parts, 2)


def gate_logits(pooled: Pooled, gate: Gate, turn: Turn) -> Float[Tensor, "b h nqb nkb"]:
    """Q_g K_g^T / sqrt(e) of projected blocks rotated to where they begin. Differentiable in the gate.

    A gate wider than a head is rotated in parts of a head's size.
    """
    heads, size = pooled.queries.shape[1], pooled.queries.shape[-1]
    kind = torch.promote_types(pooled.queries.dtype, gate.keys.dtype)
    queries, keys = pooled.queries.to(kind), pooled.keys.to(kind)
    if gate.queries is None:
        keys = keys.repeat_interleave(heads // keys.shape[1], 1)
    else:
        queries = queries @ gate.queries.to(kind)
    keys = keys @ gate.keys.to(kind)
    queries, keys = (_rotated(x, turn, size, s) for x, s in ((queries, pooled.query_start), (keys, pooled.key_start)))
    keys = keys.repeat_interleave(heads // keys.shape[1], 1)
    return queries @ keys.mT * keys.shape[-1] ** -0.5


def _rotated(x: Float[Tensor, "b h n e"], turn: Callable, size: int, positions: Tensor) -> Float[Tensor, "b h n e"]:
    parts = x.unflatten(-1, (-1, size)).transpose(2, 3).flatten(1, 2)
    return turn(parts, positions).unflatten(1, (x.shape[1], -1)).transpose(2, 3).flatten(-2)
