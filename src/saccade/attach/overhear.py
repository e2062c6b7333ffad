"""A run, overheard: each forward of each layer is shown with what was asked and which pairs were computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from saccade.attach.engine import Engine, Place
from saccade.attach.layer import SaccadeLayer
from saccade.attach.run import Run
from saccade.core.errors import CannotRun
from saccade.core.selection import causal_mask
from saccade.core.site import Stage


@dataclass(frozen=True)
class Heard:
    """One forward of one sequence in one layer.

    first: true position of its first token
    q, k: of the new tokens alone, as the model has them after RoPE
    computed: which pairs the new queries computed, of all keys up to the last of them
    """

    place: Place
    stage: Stage
    first: int
    q: Float[Tensor, "h q d"]
    k: Float[Tensor, "g q d"]
    computed: Bool[Tensor, "h q n"]


Hear = Callable[[Heard], None]


@contextlib.contextmanager
def overhearing(run: Run, hear: Hear) -> Iterator[None]:
    """Show `hear` every forward of one sequence without padding. Tokens after the prompt come one at a time."""
    for module, engine in run._engines.items():
        setattr(module, run.slot, _Beside(engine, hear))
    run.note_reads = True
    try:
        yield
    finally:
        run.note_reads = False
        for module, engine in run._engines.items():
            setattr(module, run.slot, engine)


class _Beside:
    """Stands before an engine, which works as ever."""

    def __init__(self, engine: Engine, hear: Hear):
        self.engine, self.run, self.hear = engine, engine.run, hear

    def forward(self, layer: SaccadeLayer, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """The engine's own."""
        assert q.shape[0] == 1 and real is None, "one sequence without padding is overheard"
        stage: Stage = "decode" if layer.prompt_done else "prefill"
        assert stage == "prefill" or q.shape[2] == 1, "what each later query reads is known one by one"
        before = self._before(layer)
        out = self.engine.forward(layer, q, k, v, real)
        first = layer.store.seen[0] - q.shape[2]
        computed = self._prompt(before, first, q) if stage == "prefill" else self._later(before, first, q)
        self.hear(Heard(self.engine.place, stage, first, q[0], k[0], computed))
        return out

    def _before(self, layer: SaccadeLayer) -> dict[str, Any]:
        """How many selections and reads were noted so far, and what is stored."""
        if layer.store is None:
            return {"selections": 0}
        reads = self.run.layer_record(self.engine).reads.get(0)
        noted = None if reads is None else reads.clone()
        return {"selections": len(self.engine.counts.pending), "reads": noted, "kept": layer.kept()[0]}

    def _prompt(self, before: dict[str, Any], first: int, q: Tensor) -> Bool[Tensor, "h q n"]:
        """The pairs of what was selected meanwhile; all, where nobody selects.

        Raises:
            CannotRun: a prompt is computed by a method, and not by a selection.
        """
        queries, keys = q.shape[2], first + q.shape[2]
        selections = self.engine.counts.pending[before["selections"] :]
        if not selections and "prefill" in self.run.parts:
            found = "its prompt was read by no selection, so that it cannot be told what was computed"
            raise CannotRun(f"overhear {self.run.title}", found)
        whole = causal_mask(queries, keys, q.device)
        if not selections:
            return whole.expand(q.shape[1], -1, -1)
        masks = [selection.mask()[0].to(q.device) & whole for selection in selections]
        return torch.stack([m.expand(q.shape[1], -1, -1) for m in masks]).any(0)

    def _later(self, before: dict[str, Any], first: int, q: Tensor) -> Bool[Tensor, "h 1 n"]:
        """The keys that the query read; or all that were stored, and its own."""
        heads, keys = q.shape[1], first + 1
        if "decode" in self.run.parts:
            read = self.run.layer_record(self.engine).reads[0]
            old = before["reads"]
            old = read.new_zeros(heads, 0) if old is None else old
            computed = read > pad(old, (0, read.shape[1] - old.shape[1]))
        else:
            computed = torch.zeros(len(before["kept"]), keys, dtype=torch.bool)
            for row, kept in zip(computed, before["kept"]):
                row[kept.long()] = row[-1] = True
            computed = computed.repeat_interleave(heads // len(computed), 0)
        return pad(computed, (0, keys - computed.shape[1])).to(q.device)[:, None]
