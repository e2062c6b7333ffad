"""Which stored keys matter, as a method says: marks beside them, for what it leaves out, evicts or packs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from saccade.core.method import Cache
from saccade.core.site import Site, Stage

if TYPE_CHECKING:
    from saccade.attach.engine import Engine
    from saccade.attach.layer import SaccadeLayer
    from saccade.attach.store import Bucket


def _marker(engine: Engine) -> Cache | None:
    return next((m for m in engine.parts.values() if isinstance(m, Cache) and m.marks), None)


def columns(engine: Engine, k: Float[Tensor, "b g n d"], layer: SaccadeLayer) -> dict[str, Tensor]:
    """What is stored beside new keys: no mark so far, where some method gives any."""
    method = _marker(engine)
    if method is None or (layer.prompt_done and "pack" not in method.parts):
        return {}
    return {"marks": torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device)}


def told(site: Site, stored: Mapping[str, Tensor]) -> Site:
    """A site that says which keys are marked: the same in every head."""
    return replace(site, marks=stored["marks"][:, 0]) if "marks" in stored else site


def marked(engine: Engine, layer: SaccadeLayer, rows: Bucket, q: Float[Tensor, "r s q d"], stage: Stage) -> Bucket:
    """The rows with the marks that new tokens give: to all keys of a prompt, later to the units that they end."""
    method = _marker(engine)
    if method is None or "marks" not in rows.columns or layer.tail is not None:
        return rows
    new, there, g = q.shape[2], rows.columns["keys"].shape[1], layer.store.kv_heads
    unit = method.unit_tokens if stage == "decode" else there
    ends = [end for end in range(there - new + 1, there + 1) if end % unit == 0]
    if not ends:
        return rows
    ids, marks = engine.sequences(layer, rows, method), rows.columns["marks"].clone()
    q = rearrange(q, "(b g) s q d -> b (g s) q d", g=g)
    k = rearrange(rows.columns["keys"], "(b g) n d -> b g n d", g=g)
    for end in ends:
        last = end - there + new  # of the new tokens, up to the unit's end
        asking = q if stage == "prefill" else q[:, :, last - 1 : last]
        seen = layer.store.seen[ids[0]] - there + end
        site = engine.site(layer, stage, asking.shape[2], unit, seen, ids, method.parts[0])
        found = method.mark(asking, k[:, :, end - unit : end], site)
        engine.keep_state(layer, method, site, ids)
        marks[:, end - unit : end] = found.repeat_interleave(g, 0)
    layer.store.put("marks", rows.rows, marks)
    return replace(rows, columns={**rows.columns, "marks": marks})


def by_queries(engine: Engine) -> bool:
    """Whether tokens after the prompt are marked, by their queries."""
    method = _marker(engine)
    return method is not None and "pack" in method.parts


def put_away(engine: Engine, layer: SaccadeLayer, q: Float[Tensor, "b h n d"]) -> None:
    """Mark the last tokens of the store, which have been beside it so far, as `marked` would have one by one."""
    by_row = rearrange(q, "b (g s) n d -> (b g) s n d", g=layer.store.kv_heads)
    for rows in list(layer.store.buckets):
        marked(engine, layer, rows, by_row.index_select(0, rows.rows), "decode")


def forget(engine: Engine, layer: SaccadeLayer) -> None:
    """At the end of the prompt: what marks were made from, and the marks themselves where nothing is packed by them."""
    method = _marker(engine)
    if method is None:
        return
    for states in (layer.states, layer.prompt_states):
        states.pop(method.card.name, None)
    if "pack" not in method.parts:
        layer.store.forget("marks")
