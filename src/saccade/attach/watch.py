"""A probe at work: it looks on while the model computes on its own cache, and what it notes lies beside that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saccade.attach.engine import Place
from saccade.attach.layer import WatchedLayer
from saccade.attach.run import Run
from saccade.core.errors import CannotRun
from saccade.core.method import Probe
from saccade.core.record import LayerRecord, Notes, Record, Table
from saccade.core.shard import Shard
from saccade.core.site import Seen, Site, Stage

BESIDE = ("real", "tokens")  # noted of each token, not of its heads


class Watch(Run):
    """The handle that `attach` returns for a probe: `result()` is what came of the last sequences.

    The model's own attention computes, on its own cache; nothing is dropped, and no output changes by a bit.
    """

    slot = "_saccade_beside"

    @property
    def probe(self) -> Probe:
        """What looks on."""
        (probe,) = self.methods
        assert isinstance(probe, Probe), "a probe is attached alone"
        return probe

    def notes(self) -> list[Notes]:
        """What was noted of each of the last sequences; after a beam search, of its beams."""
        layers = [layer.notes for _, layer in sorted(self._layers.items())]
        slots = max((layer.prompt_slots for layer in self._layers.values()), default=0)
        return [_of_row(layers, row, slots, self.shard) for row in range(len(layers[0]["tokens"]) if layers else 0)]

    def result(self) -> Table:
        """The probe's table of the last sequences."""
        return self.probe.result(self.notes())

    def _engine(self, place: Place) -> Watcher:
        return Watcher(self, place)

    def _layer(self, index: int, engine: Any) -> WatchedLayer:
        return WatchedLayer(self)

    def _give_cache(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        if self.ids is None:
            raise CannotRun(f"run this model under {self.title}", "it was given no input_ids to tell tokens by", "")
        return super()._give_cache(model, args, kwargs)

    def _end_prompt(self, engine: Any, layer: Any) -> None:
        """Nothing happens then."""

    def begin(self, engine: Any, layer: Any) -> None:
        self._layers[engine.place.layer] = layer

    @property
    def record(self) -> Record:
        """All that was read is there: tokens, and bytes held with the notes among them."""
        out, heads = Record(), {watcher.place.layer: watcher.place.kv_heads for watcher in self._engines.values()}
        for index, layer in self._layers.items():
            seen = layer.notes["real"].sum(-1).tolist()
            kept = [[torch.arange(n) for _ in range(heads[index])] for n in seen]
            out.layers[index] = LayerRecord(index, bytes_held=layer.bytes_held(), seen=seen, kept=kept)
        return out


class Watcher:
    """Beside one attention module. Holds no per-sequence state: that lies in the cache layer."""

    def __init__(self, run: Watch, place: Place):
        self.run, self.place = run, place

    def after(
        self,
        layer: WatchedLayer | None,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b g k d"],
        v: Float[Tensor, "b g k d"],
        real: Bool[Tensor, "b k"] | None,
        out: Float[Tensor, "b q h d"],
    ) -> Float[Tensor, "b q h d"]:
        """Let the probe look, and give back what came."""
        layer = layer or WatchedLayer(self.run)  # without a cache: one that is forgotten afterwards
        if not layer.notes:
            self.run.begin(self, layer)
        new = self._new(q.detach(), k.detach(), v.detach(), real, "decode" if layer.prompt_done else "prefill")
        rows, queries = q.shape[0], q.shape[2]
        new["real"] = q.new_ones(rows, queries, dtype=torch.bool) if real is None else real[:, -queries:]
        if self.place.layer == 0:
            assert self.run.ids is not None and self.run.ids.shape == (rows, queries), "ids are those of this forward"
            new["tokens"] = self.run.ids.detach().to(q.device)
        layer.note(new, self.run.more_prompt)
        return out

    @torch.no_grad()
    def _new(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, stage: Stage) -> dict[str, Tensor]:
        """Notes [b q h ...]; where rows are padded, each is shown alone and without its padding."""
        if real is None:
            return self._see(q, k, v, stage)
        notes: dict[str, Tensor] = {}
        for row, there in enumerate(real):
            keys, asking = there.nonzero()[:, 0], there[-q.shape[2] :].nonzero()[:, 0]
            if not len(asking):
                continue
            one = slice(row, row + 1)
            for name, x in self._see(q[one, :, asking], k[one, :, keys], v[one, :, keys], stage).items():
                notes.setdefault(name, x.new_zeros(len(real), q.shape[2], *x.shape[2:]))[row, asking] = x[0]
        return notes

    def _see(self, q: Tensor, k: Tensor, v: Tensor, stage: Stage) -> dict[str, Tensor]:
        place, keys, run = self.place, k.shape[2], self.run
        site = Site(
            layer=place.layer, layers=place.layers, heads=place.heads, kv_heads=place.kv_heads,
            head_size=place.head_size, stage=stage, queries=q.shape[2], keys=keys, seen=keys, scale=place.scale,
            budget=run.budget, softcap=place.softcap, seed=run.seed, bytes_per_token=run.bytes_per_token,
            shard=run.shard,
        )  # fmt: skip
        positions = torch.arange(keys, device=k.device).expand(*k.shape[:2], -1)
        return {n: x.transpose(1, 2) for n, x in run.probe.see(Seen(k, v, positions, q), site).items()}


def _of_row(layers: list[Mapping[str, Tensor]], row: int, slots: int, shard: Shard) -> Notes:
    real = layers[0]["real"][row]
    own = [{n: shard.gather(x[row, real].transpose(0, 1), 0).cpu() for n, x in layer.items() if n not in BESIDE}
           for layer in layers]  # fmt: skip
    return Notes(layers[0]["tokens"][row, real].cpu(), int(real[:slots].sum()), own)
