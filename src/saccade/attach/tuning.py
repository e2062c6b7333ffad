"""Fine-tuning under gates: the model learns in the sparse attention it will run in, gates go on learning its maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor

from saccade import ops
from saccade.attach import _equipped
from saccade.attach.calibration import Subject, checked
from saccade.attach.distil import distance
from saccade.attach.engine import Place
from saccade.attach.listening import listening
from saccade.attach.probe import Spot
from saccade.core.budget import Budget
from saccade.core.errors import CannotRun
from saccade.core.site import Site
from saccade.methods.sparse.seer_attention import SeerAttention, stored


class Tuning:
    """One step:  loss of the next tokens in sparse attention  +  weight x mean over layers of KL(G || softmax S).

    The choice of blocks has no gradient: the model learns through the blocks that were computed, the gates through
    their distance from the whole map by blocks, which is made without a map of all rows. What a gate sees of a layer is
    taken as it is, so that the second part trains gates alone.

    method: with its gates, or those that `attach` would find; budget: of each forward; gate_weight: of the distance
    gates: float32, by name, [layers ...]; give them to the optimiser beside the model's own weights

    Raises:
        CannotRun: no gates, gates of another model, or checkpointing of activations, which runs layers twice.
    """

    def __init__(self, model: Any, method: SeerAttention, budget: float | str | Budget, gate_weight: float = 1.0):
        self.subject, self.budget = Subject(model), Budget.of(budget)
        self.method = method = cast("SeerAttention", _equipped(model, method, self.subject.found))
        self.gate_weight, self.distances = gate_weight, list[Tensor]()
        reasons = [r for spot in self.subject.found.sites for r in method.check(self._site(spot.place, 1))]
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            reasons.append("activations are checkpointed, and each layer would count twice; switch that off")
        if reasons:
            raise CannotRun(f"fine-tune {self.subject.name} under {method.card.name}", list(dict.fromkeys(reasons)), "")
        self.gates = {name: x.to(model.device).requires_grad_() for name, x in method.gates().items()}

    def step(self, ids: Int[Tensor, "b n"]) -> tuple[float, float]:
        """Adds up gradients of the model and the gates on rows without padding; returns both parts of the loss."""
        self.distances.clear()
        with listening(self.subject.model, self.subject.found, lambda spot: _Gated(self, spot)):
            loss = self.subject.model(input_ids=ids, labels=ids, use_cache=False).loss
            apart = sum(self.distances) / len(self.distances)
            (loss + self.gate_weight * apart).backward()
        return float(loss.detach()), float(apart.detach())

    def tuned(self, samples: Sequence[Tensor]) -> SeerAttention:
        """The method with the gates as they are now, stamped for the model as it is now; `samples`: what was read."""
        subject, figures = Subject(self.subject.model), {"tuned_at": str(self.budget)}
        made = subject.artefact(self.method, stored(self.gates), checked(samples), figures)
        return dataclasses.replace(self.method, artefact=made)

    def _site(self, place: Place, tokens: int) -> Site:
        shape = {"queries": tokens, "keys": tokens, "seen": tokens}
        return Site(**dataclasses.asdict(place), stage="prefill", budget=self.budget, **shape)


class _Gated:
    """One module's attention over the blocks that its gate chooses."""

    def __init__(self, tuning: Tuning, spot: Spot):
        self.tuning, self.place, self.run = tuning, spot.place, SimpleNamespace(title="fine-tuning under gates")

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        if real is not None:
            raise CannotRun("fine-tune on padded rows", "gates see whole rows", "Give rows without an attention mask.")
        tuning, place, block = self.tuning, self.place, self.tuning.method.block_tokens
        mine = {name: x[place.layer] for name, x in tuning.gates.items()}
        gate, site = ops.Gate(mine["keys"], mine.get("queries")), tuning._site(place, q.shape[2])
        bare_q, bare_k, options = q.detach(), k.detach(), {"scale": place.scale, "softcap": place.softcap}
        assert place.turn is not None, "the method's check refuses to run without"
        pooled = ops.pool_for_gate(bare_q, bare_k, place.turn, block)
        maps = ops.pooled_map(bare_q, bare_k, block, **options)
        tuning.distances.append(distance(ops.gate_logits(pooled, gate, place.turn), maps))
        return ops.attend(q, k, v, tuning.method.choose(bare_q, bare_k, gate, site), **options)[0]
