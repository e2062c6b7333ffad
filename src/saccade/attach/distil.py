"""Distilling gates: each layer's gate learns to guess the model's own attention map by blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.attach.gates import Progress
from saccade.attach.resuming import SAVED_EVERY, resume, state
from saccade.core import rng
from saccade.core.artefact import Draft
from saccade.core.errors import BadInput, CannotRun

if TYPE_CHECKING:
    from saccade.attach.calibration import Subject
    from saccade.methods.sparse.seer_attention import SeerAttention

INIT = 0.02  # deviation of the first weights
WARM_UP = 20  # steps
Example = Mapping[str, Tensor]


class Distilling:
    """Trains gates of a frozen model by  sum over layers of KL(G || softmax S),  G the map by blocks.

    A forward of a text leaves pooled queries, keys and maps of all layers, a few megabytes, and training reads nothing
    else. So each text is seen by the model once, however many steps there are.
    """

    def __init__(self, subject: Subject, recipe: SeerAttention, draft: Draft):
        self.subject, self.recipe, self.draft = subject, recipe, draft
        self.places = [spot.place for spot in sorted(subject.found.sites, key=lambda spot: spot.place.layer)]
        unknown = [place.layer for place in self.places if place.turn is None]
        if unknown:
            asked = f"train gates of {subject.name}"
            raise CannotRun(asked, f"how layers {unknown} mark positions is not known", "Use another method.")

    def train(
        self, rows: Sequence[Int[Tensor, "1 n"]], progress: Progress | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gates of all layers, and figures of the training."""
        sizes = sorted({row.shape[1] for row in rows})
        if len(sizes) > 1 or sizes[0] <= self.recipe.block_tokens:
            found = f"blocks are of {self.recipe.block_tokens}, and rows must be longer, and as long as each other"
            raise BadInput(f"train gates on rows of {sizes} tokens", found, "Cut them so.")
        examples = []
        for i, row in enumerate(rows):
            examples.append(self.draft.kept(f"text-{i}", functools.partial(self.example, row)))
            if progress is not None:
                progress(i + 1, len(rows) + self.recipe.train_steps, "maps of texts")
        gates, losses = self._train(examples, progress)
        self.draft.clear()
        tenth = max(1, len(losses) // 10)
        ends = {"distance_at_first": losses[0], "distance": sum(losses[-tenth:]) / tenth}
        return gates, {name: round(x / len(self.places), 4) for name, x in ends.items()}

    def example(self, row: Int[Tensor, "1 n"]) -> dict[str, Tensor]:
        """Pooled queries [layers h nb d], keys [layers g nb 3d] and maps [layers h nb nb] of a text."""
        found, block = [], self.recipe.block_tokens
        for layer, q, k, _ in self.subject.capture_qkv([row]):
            place = self.places[layer]
            pooled = ops.pool_for_gate(q, k, place.turn, block)
            maps = ops.pooled_map(q, k, block, scale=place.scale, softcap=place.softcap)
            found.append([x.to("cpu", torch.float16) for x in (pooled.queries, pooled.keys, maps)])
        return {name: torch.cat(x) for name, x in zip(("queries", "keys", "maps"), zip(*found))}

    def _train(
        self, examples: Sequence[Example], progress: Progress | None
    ) -> tuple[dict[str, Tensor], list[float]]:
        recipe, device = self.recipe, self.subject.model.device
        gates = {name: x.to(device).requires_grad_() for name, x in first_gates(recipe, examples[0]).items()}
        optimiser = torch.optim.AdamW(gates.values(), lr=recipe.learning_rate, weight_decay=0.0)
        losses = resume(self.draft.load("training"), gates, optimiser)
        for step in range(len(losses), recipe.train_steps):
            optimiser.param_groups[0]["lr"] = recipe.learning_rate * _rate(step, recipe.train_steps)
            draw = rng.python("distil/texts", 0, step)
            some = draw.sample(range(len(examples)), min(recipe.train_texts, len(examples)))
            losses.append(self._backward([examples[i] for i in some], gates))
            optimiser.step()
            optimiser.zero_grad()
            if progress is not None:
                said = f"training gates, distance {losses[-1] / len(self.places):.4f}"
                progress(len(examples) + step + 1, len(examples) + recipe.train_steps, said)
            if (step + 1) % SAVED_EVERY == 0:
                self.draft.save("training", state(losses, gates, optimiser))
        return {name: x.detach() for name, x in gates.items()}, losses

    def _backward(self, examples: Sequence[Example], gates: Mapping[str, Tensor]) -> float:
        """Gradient of the gates on some texts; returns the loss, layer by layer so that little is held."""
        total, block, device = 0.0, self.recipe.block_tokens, self.subject.model.device
        for place in self.places:
            q, k, maps = (
                torch.stack([x[name][place.layer] for x in examples]).to(device, torch.float32)
                for name in ("queries", "keys", "maps")
            )
            start = torch.arange(k.shape[2], device=device) * block
            mine = {name: x[place.layer] for name, x in gates.items()}
            with torch.enable_grad():
                gate = ops.Gate(mine["keys"], mine.get("queries"))
                loss = distance(ops.gate_logits(ops.Pooled(q, k, start, start), gate, place.turn), maps)
                loss.backward()
            total += float(loss.detach())
        return total


def distance(logits: Float[Tensor, "b h n n"], maps: Float[Tensor, "b h n n"]) -> Float[Tensor, ""]:
    """KL(G || softmax S) of a gate's logits, summed over keys and averaged over rows of blocks but the first quarter,
    in which there is little to choose; G the map, each of its rows to sum to 1."""
    rows = maps.shape[-1] // 4
    causal = torch.ones(maps.shape[-2:], dtype=torch.bool, device=maps.device).tril()
    guess = logits.masked_fill(~causal, -torch.inf).log_softmax(-1)[:, :, rows:].masked_fill(~causal[rows:], 0.0)
    wanted = maps[:, :, rows:] / maps[:, :, rows:].sum(-1, keepdim=True)
    return (torch.xlogy(wanted, wanted) - wanted * guess).sum(-1).mean()


def first_gates(recipe: SeerAttention, example: Example) -> dict[str, Tensor]:
    """Such that blocks are at first compared by their means, but for noise."""
    (layers, heads, _, size), groups = example["queries"].shape, example["keys"].shape[1]
    wide = max(1, recipe.train_parts) * size
    shapes = {"keys": (layers, groups if recipe.train_parts else heads, 3 * size, wide)}
    shapes |= {"queries": (layers, heads, size, wide)} if recipe.train_parts else {}
    draw = rng.generator("distil/gates")
    gates = {name: INIT * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for x in gates.values():
        x[..., -size:, :size] += torch.eye(size)
    return gates


def _rate(step: int, steps: int) -> float:
    """Learning-rate factor: up in some steps, then down along a cosine."""
    up = min(WARM_UP, steps // 10)
    if step < up:
        return (step + 1) / up
    return 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, steps - up)))
