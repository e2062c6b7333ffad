"""The newest tokens of a layer, beside its store: what a CUDA graph of a decoding step reads and writes.

A graph repeats the same work on the same memory, so that what is stored may not grow between its replays. New tokens
go into a tail of a fixed size, at a place that the device knows; each query reads all of the tail up to itself, beside
what the methods choose of the store. Who asks for the store meanwhile finds the tail's tokens in it: they are put away
first, and the graph is worth nothing any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import ops
from saccade.attach import marking
from saccade.attach.counts import Counts
from saccade.core.record import LayerRecord

if TYPE_CHECKING:
    from saccade.attach.engine import Engine
    from saccade.attach.layer import SaccadeLayer
    from saccade.attach.store import Bucket


@dataclass
class Clock:
    """Which slot of the tails the newest token has, on the device; shared by all layers."""

    at: Int[Tensor, " 1"]
    visible: Bool[Tensor, "1 1 1 t"]

    @classmethod
    def of(cls, tokens: int, device: torch.device) -> Clock:
        """Before the first token."""
        at = torch.zeros(1, dtype=torch.long, device=device)
        return cls(at, torch.zeros(1, 1, 1, tokens, dtype=torch.bool, device=device))

    def set(self, slot: int) -> None:
        """From now on the newest token is in that slot, the one behind the last."""
        self.at.fill_(slot)
        self.visible[..., : slot + 1] = True


@dataclass
class Tail:
    """Of one layer. `live` while a step reads and writes it.

    queries: of its tokens, where a method goes by them when they are put away
    each: what one step over the store computed, the same in every step; `pairs`, and keys `visited` by searches: what
        the device counted, of all steps
    """

    clock: Clock
    keys: Float[Tensor, "b g t d"]
    values: Float[Tensor, "b g t d"]
    queries: Float[Tensor, "b h t d"] | None
    pairs: Float[Tensor, " 1"]
    visited: Int[Tensor, " 1"]
    each: LayerRecord = field(default_factory=lambda: LayerRecord(0))
    count: int = 0
    live: bool = False

    @classmethod
    def beside(cls, engine: Engine, layer: SaccadeLayer, tokens: int, clock: Clock) -> Tail:
        """An empty one for a layer."""
        keys, values = (layer.store.buckets[0].columns[name] for name in ("keys", "values"))
        shape = layer.store.sequences, layer.store.kv_heads, tokens
        wanted = marking.by_queries(engine)
        return cls(
            clock,
            keys.new_zeros(*shape, keys.shape[-1]),
            values.new_zeros(*shape, values.shape[-1]),
            keys.new_zeros(shape[0], engine.place.heads, tokens, keys.shape[-1]) if wanted else None,
            torch.zeros(1, dtype=torch.double, device=keys.device),
            torch.zeros(1, dtype=torch.long, device=keys.device),
        )


def forward(
    engine: Engine,
    layer: SaccadeLayer,
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b g 1 d"],
    v: Float[Tensor, "b g 1 d"],
) -> Float[Tensor, "b h 1 d"]:
    """Attention of one token of each sequence over the store and the tail, in which it is now."""
    tail, counts = layer.tail, engine.counts
    for column, new in ((tail.keys, k), (tail.values, v)):
        column.index_copy_(2, tail.clock.at, new)
    if tail.queries is not None:
        tail.queries.index_copy_(2, tail.clock.at, q)
    if engine.place.layer == 0:
        engine.run.handed.clear()
    tail.each = LayerRecord(engine.place.layer)
    engine.counts = Counts(lambda: tail.each)
    try:
        out = engine.attend(layer, q, None, "decode")
        if engine.counts.decoded is not None:
            tail.pairs += engine.counts.decoded
        if engine.counts.visited is not None:
            tail.visited += engine.counts.visited
    finally:
        engine.counts = counts
    if engine.place.layer == engine.place.layers - 1:
        engine.run.handed.clear()
    return out


def joined(
    engine: Engine, layer: SaccadeLayer, rows: Bucket, q: Float[Tensor, "r s q d"], out: Tensor, lse: Tensor | None
) -> Float[Tensor, "r s q d"]:
    """Attention of some rows over what is stored, and over their tail if they have one."""
    tail = layer.tail
    if tail is None:
        return out
    assert lse is not None, "who computes without a log-sum-exp is refused"
    keys, values = (x.flatten(0, 1) for x in (tail.keys, tail.values))
    if rows.rows.shape[0] < keys.shape[0]:
        keys, values = (x.index_select(0, rows.rows) for x in (keys, values))
    options = {"scale": engine.place.scale, "softcap": engine.place.softcap, "visible": tail.clock.visible}
    near = ops.decode(q, keys[:, None], values[:, None], **options)
    return ops.merge_lse(*zip((out, lse), near))[0]


def put_away(layer: SaccadeLayer) -> None:
    """The tail's tokens join those that are stored, as if they had been read one by one, and there is no tail then."""
    tail, layer.tail = layer.tail, None
    if tail is None or not tail.count:
        return
    engine, n = layer.engine, tail.count
    with torch.inference_mode(tail.keys.is_inference()), torch.no_grad():
        keys, values = (x[:, :, :n] for x in (tail.keys, tail.values))
        layer.store.append(engine.columns(keys, values, layer, "decode"), None)
        if tail.queries is not None:
            marking.put_away(engine, layer, tail.queries[:, :, :n])
        engine.evict(layer)
        engine.refresh(layer, n)
        _count(engine, tail, layer.store.sequences)


def _count(engine: Engine, tail: Tail, sequences: int) -> None:
    """What these steps computed: over the store, and of the tail 1, 2, ... keys by each query."""
    n, queries = tail.count, sequences * engine.place.heads
    own = n * (n + 1) / 2 * queries
    record = engine.run.layer_record(engine)
    record.pairs["decode"] += n * tail.each.pairs["decode"] + own
    record.pairs_causal["decode"] += n * tail.each.pairs_causal["decode"] + own
    engine.counts.add(tail.pairs)
    engine.counts.searched(tail.visited, n * tail.each.keys_searched)
