"""What goes from a layer's cache after a forward, and what begins when the prompt has ended."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from saccade.attach import far, marking, packing
from saccade.attach.layer import SaccadeLayer
from saccade.attach.store import Bucket, Store, by_head, numbers, regroup
from saccade.core.method import Cache, Decode
from saccade.core.site import Seen, Site, Stage

if TYPE_CHECKING:
    from saccade.attach.engine import Engine

Reach = list[list[tuple[int, int]]]  # sinks and recent tokens, by sequence and key/value head


def evict(engine: Engine, layer: SaccadeLayer, prompt_end: bool = False) -> None:
    """Drop what the method gives up: after every forward if it is rolling, else once, at the end of the prompt; at
    both times if it is rolling and leaves the prefill alone.

    Then, at that end, what reads the cache from there on may begin; and from there on what is to be packed is.
    """
    method, reader, packer = (engine.parts.get(part) for part in ("evict", "decode", "pack"))
    if layer.store is None:
        return
    if isinstance(method, Cache):
        always = method.rolling and "prefill" in method.parts
        if prompt_end and not always:
            _evict_by_score(engine, method, layer)
        elif always or (method.rolling and layer.prompt_done):
            _evict_rolling(engine, method, layer)
    if prompt_end and isinstance(reader, Decode) and reader.observe_tokens:
        _begin(engine, reader, layer)
    if isinstance(packer, Cache) and layer.prompt_done:
        packing.pack(layer.store, packer, prompt_end)
    if prompt_end:
        layer.queries = []
        marking.forget(engine, layer)


def _begin(engine: Engine, method: Decode, layer: SaccadeLayer) -> None:
    """Show the end of the prompt to a method that chooses by it what later queries read, or where that lies."""
    layer.store.move(layer.queries[0].device)
    left = []
    for _, rows in layer.store.pieces(layer.store.seen):
        left.append(rows)
        if not rows.length:
            continue
        ids = engine.sequences(layer, rows, method)
        site = engine.site(layer, "prefill", 0, rows.length, layer.store.seen[ids[0]], ids, "decode")
        if method.shelves:
            left[-1] = _shelve(engine, method, layer, rows, ids, site)
        else:
            method.begin(_seen(layer, rows, ids, method), site)
        engine.keep_state(layer, method, site, ids)
    if method.shelves:
        layer.store.buckets = regroup(left)


def _shelve(engine: Engine, method: Decode, layer: SaccadeLayer, rows: Bucket, ids: list[int], site: Site) -> Bucket:
    """What of these rows stays on the device; the layer keeps the rest in host memory."""
    found = method.shelve(_seen(layer, rows, ids, method), site)
    if found is None:
        return rows
    rows, shelved = far.shelve(rows, *found)
    layer.far = layer.far or [None] * layer.store.sequences
    for i, f in zip(ids, shelved):
        layer.far[i] = f
    return rows


def _seen(layer: SaccadeLayer, rows: Bucket, ids: list[int], method: Cache | Decode) -> Seen:
    """What a method asked to look at."""
    stored = by_head({**rows.columns, "positions": rows.positions}, layer.store.kv_heads)
    wanted = method.observe_tokens
    queries = torch.stack([layer.queries[i][:, -wanted:] for i in ids]) if wanted else None
    return Seen(stored["keys"], stored["values"], stored["positions"], queries, stored.get("tally"))


def _evict_rolling(engine: Engine, method: Cache, layer: SaccadeLayer) -> None:
    """Keep what the next query may still see."""
    store, kept, reach = layer.store, [], _reach(engine, method, layer, 0)
    for rows in store.buckets:
        gone = _gone(store, rows, reach, 0)
        if gone is not None:
            for (first, count), part in store.parts(rows, gone):
                store.dropped = store.dropped or bool(count)
                kept.append(part.without(first, count) if count else part)
            continue
        ids = store.sequence_of(rows)
        last = torch.tensor([store.seen[i] for i in ids], device=rows.rows.device)
        site = engine.site(layer, "decode", 1, rows.length, max(store.seen), ids, "evict")
        stays = method.visible(last[:, None], rows.positions, rows.rows % store.kv_heads, site)
        kept.extend([rows] if stays is None else _keep(method, store, rows, stays[:, 0]))
    store.buckets = kept if len(kept) == 1 else regroup(kept)


def out_of_reach(
    engine: Engine, method: Cache, layer: SaccadeLayer, rows: Bucket, ahead: int
) -> list[tuple[int, int]] | None:
    """For each row the slots, first and count, out of reach of a query `ahead` tokens behind the last one seen. None:
    the device has to be asked."""
    return _gone(layer.store, rows, _reach(engine, method, layer, ahead), ahead)


def _reach(engine: Engine, method: Cache, layer: SaccadeLayer, ahead: int) -> Reach | None:
    """What such a query reaches, for each sequence and head; while a prompt is read, one at its end. None where the
    method does not say it in numbers."""
    store = layer.store
    if method.merges or not store.buckets:
        return None
    most = max(b.length for b in store.buckets)
    site = engine.site(layer, "decode", 1, most, max(store.seen), list(range(store.sequences)), "evict")
    further = [ahead if layer.prompt_done else engine.coming(layer, [i]) for i in range(store.sequences)]
    return method.reach([n + more for n, more in zip(store.seen, further)], site)


def _gone(store: Store, rows: Bucket, reach: Reach | None, ahead: int) -> list[tuple[int, int]] | None:
    if reach is None or rows.packed:
        return None
    places = zip(store.sequence_of(rows), numbers(rows.rows))
    asked = [(*reach[i][row % store.kv_heads], store.seen[i]) for i, row in places]
    found = {key: rows.out_of_reach(*key[:2], key[2] + ahead, key[2]) for key in set(asked)}
    return None if None in found.values() else [found[key] for key in asked]


def _evict_by_score(engine: Engine, method: Cache, layer: SaccadeLayer) -> None:
    store, kept, empty = layer.store, [], []
    for _, rows in store.pieces(store.seen):
        ids = store.whole_sequences(rows)
        assert ids is not None, "nothing was evicted before the end of the prompt"
        if not rows.length:
            kept.append(rows)
            empty += ids
            continue
        kept.extend(_best(engine, method, layer, rows, ids, "prefill"))
    for kind in (layer.states, layer.prompt_states):
        if method.card.name in kind:
            kind[method.card.name].blank(empty)
    store.buckets = regroup(kept)


def evict_by_weight(engine: Engine, layer: SaccadeLayer) -> None:
    """After a token: score again by its query. A sequence that got none stays as it is."""
    method, store, kept = engine.parts["evict"], layer.store, []
    new = [bool(q.shape[1]) for q in layer.queries] or [True] * store.sequences
    for mark, rows in store.pieces([2 * seen + some for seen, some in zip(store.seen, new)]):
        ids = store.whole_sequences(rows)
        assert ids is not None, "a weighing method keeps as many keys in every head"
        kept.extend(_best(engine, method, layer, rows, ids, "decode") if mark % 2 else [rows])
    store.buckets, layer.queries = regroup(kept), []


def _best(
    engine: Engine, method: Cache, layer: SaccadeLayer, rows: Bucket, ids: list[int], stage: Stage
) -> list[Bucket]:
    """The rows with the keys of highest score, as many as each head is allowed."""
    site = engine.site(layer, stage, 0, rows.length, layer.store.seen[ids[0]], ids)
    site = marking.told(site, by_head(rows.columns, layer.store.kv_heads))
    scores = method.score(_seen(layer, rows, ids, method), site)
    counts = method.allocate(scores, site.budget, site).clamp(1, rows.length)
    engine.keep_state(layer, method, site, ids)
    count, *others = set(counts.flatten().tolist())
    if count == rows.length and not others:
        return [rows]
    best = scores.argsort(dim=-1, descending=True, stable=True)
    if others or method.merges:
        stays = best.argsort(-1) < counts.to(scores.device)[..., None]
        return _keep(method, layer.store, rows, stays.flatten(0, 1))
    layer.store.dropped = True
    return [rows.take(best[..., :count].sort(-1).values.flatten(0, 1))]


def _keep(method: Cache, store: Store, rows: Bucket, stays: Bool[Tensor, "r n"]) -> list[Bucket]:
    """The rows with what stays, which takes over from what goes where the method merges."""
    if method.merges and not bool(stays.all()):
        keys, values = method.merge(rows.columns["keys"], rows.columns["values"], rows.positions, stays)
        rows = replace(rows, columns={**rows.columns, "keys": keys, "values": values}, space=None)
    return store.keep(rows, stays)
