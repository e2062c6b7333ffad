"""Distilling estimators: each layer's small net learns to draw the model's own attention maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.attach.gates import Progress
from saccade.attach.resuming import SAVED_EVERY, resume, state
from saccade.core import rng
from saccade.core.artefact import Draft
from saccade.core.budget import Budget
from saccade.core.errors import BadInput
from saccade.core.selection import Pairs, causal_mask
from saccade.core.site import Site
from saccade.methods.sparse.sea import Sea, Weights, best_pixels, edges, estimate, mixed

if TYPE_CHECKING:
    from saccade.attach.calibration import Subject

KL_WEIGHT = 0.1
GATE_AT_FIRST = 3.0  # sigmoid of it: nearly all of the sparse part, little of the mean
WARM_UP = 10  # steps


class Estimating:
    """Trains the estimators of a frozen model, each by the loss of its own layer. The model reads every text once; its
    queries, keys and values are held in 16 bits, and maps are made anew when they are wanted. `draft`: where weights
    are kept meanwhile."""

    def __init__(self, subject: Subject, recipe: Sea, draft: Draft):
        self.subject, self.recipe, self.draft = subject, recipe, draft
        self.places = [spot.place for spot in sorted(subject.found.sites, key=lambda spot: spot.place.layer)]

    def train(
        self, rows: Sequence[Int[Tensor, "1 n"]], progress: Progress | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weights [layers ...] of all layers, and figures of the training."""
        sizes = sorted({row.shape[1] for row in rows})
        if len(sizes) > 1 or sizes[0] < 2:
            found = "texts take turns, and must be as long as each other and of two tokens at least"
            raise BadInput(f"train estimators on rows of {sizes} tokens", found, "Cut them so.")
        recipe, texts = self.recipe, []
        for i, row in enumerate(rows):
            texts.append([[x.half() for x in some] for _, *some in self.subject.capture_qkv([row])])
            if progress is not None:
                progress(i + 1, len(rows) + recipe.train_steps, "reading texts")
        first = first_weights(len(self.places), self.subject.heads, self.subject.head_size, recipe.pixels)
        weights = {name: x.to(self.subject.model.device).requires_grad_() for name, x in first.items()}
        optimiser = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=0.0)
        losses = resume(self.draft.load("training"), weights, optimiser)
        for step in range(len(losses), recipe.train_steps):
            optimiser.param_groups[0]["lr"] = recipe.learning_rate * _rate(step, recipe.train_steps)
            some = rng.python("sea/texts", 0, step).sample(texts, min(recipe.train_texts, len(texts)))
            losses.append(self._backward(some, weights))
            optimiser.step()
            optimiser.zero_grad()
            if (step + 1) % SAVED_EVERY == 0:
                self.draft.save("training", state(losses, weights, optimiser))
            if progress is not None:
                done = len(rows) + step + 1
                progress(done, len(rows) + recipe.train_steps, f"training estimators, loss {losses[-1]:.4f}")
        self.draft.clear()
        tenth = max(1, len(losses) // 10)
        figures = {"loss_at_first": sum(losses[:tenth]) / tenth, "loss": sum(losses[-tenth:]) / tenth}
        return {name: x.detach() for name, x in weights.items()}, {n: round(x, 4) for n, x in figures.items()}

    def _backward(self, texts: Sequence[Sequence[Sequence[Tensor]]], weights: Weights) -> float:
        """Gradients of all layers on some texts, one after the other so that little is held; their mean loss."""
        total = 0.0
        for place, *some in zip(self.places, *texts):
            q, k, v = (torch.cat(x).float() for x in zip(*some))
            n = q.shape[2]
            shape = {"queries": n, "keys": n, "seen": n, "budget": Budget(self.recipe.train_share)}
            site = Site(**asdict(place), stage="prefill", **shape)
            with torch.enable_grad():
                loss = layer_loss(q, k, v, {name: x[place.layer] for name, x in weights.items()}, site)
                loss.backward()
            total += float(loss.detach())
        return total / len(self.places)


def layer_loss(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n d"], weights: Weights, site: Site
) -> Float[Tensor, ""]:
    """KL(A || est) / 10 + |A - est|^2 + |o - A v|^2 / |A v|^2, A the layer's own map and est spread over its tokens."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    image, gates = estimate(q, k, v, weights, site)
    hidden = ~causal_mask(n, n, q.device)
    logits = q @ k.repeat_interleave(group, 1).mT * site.scale
    logits = logits if site.softcap is None else site.softcap * torch.tanh(logits / site.softcap)
    wanted = logits.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0.0)
    guess = spread(image).masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0.0)
    exact, drawn = (x.exp().masked_fill(hidden, 0.0) for x in (wanted, guess))
    apart = (exact * (wanted - guess)).sum(-1).mean()
    edge = edges(n, n, image.shape[-1], image.device)
    keep = best_pixels(image.detach(), edge, site.budget.row_tokens(n))
    chosen = keep.gather(-1, _pixel(n, image).expand_as(hidden).expand(*keep.shape[:2], -1, -1))
    chosen = (chosen | torch.eye(n, dtype=torch.bool, device=q.device)) & ~hidden
    pairs = Pairs(allowed=chosen, queries=n, keys=n)
    out = mixed(ops.attend(q, k, v, pairs, scale=site.scale, softcap=site.softcap, impl="reference")[0], v, gates)
    context = exact @ v.repeat_interleave(group, 1)
    missed = (out - context).square().mean() / context.square().mean()
    return KL_WEIGHT * apart + (exact - drawn).square().mean() + missed


def _pixel(n: int, image: Tensor) -> Int[Tensor, "n n"]:
    """Which pixel of its row each token before the query has; 0 behind it."""
    pixels = image.shape[-1]
    at = torch.arange(n, device=image.device, dtype=torch.float64)
    pixel = torch.floor((at + 0.5) / (at[:, None] + 1) * pixels - 1e-4).long()
    return pixel.clamp(min=0).masked_fill(pixel >= pixels, 0)


def spread(image: Float[Tensor, "b h n p"]) -> Float[Tensor, "b h n n"]:
    """A picture of n rows with the logit of its pixel at every token."""
    n = image.shape[2]
    return image.gather(-1, _pixel(n, image).expand(*image.shape[:2], -1, -1))


def first_weights(layers: int, heads: int, size: int, pixels: int) -> dict[str, Tensor]:
    """At random; the mean has little weight in the mixture."""
    shapes = {
        "encode": (3 * size, 2 * size),
        "decode": (2 * size, pixels // 2),
        "first": (2 * heads, 2 * heads, 3, 3),
        "second": (2 * heads, 2 * heads, 3, 3),
        "last": (heads, 2 * heads, 3, 3),
    }
    out, draw = {}, rng.generator("sea/weights")
    for name, shape in shapes.items():
        dense = len(shape) == 2
        fan = shape[0] if dense else math.prod(shape[1:])
        out[name] = torch.randn(layers, *shape, generator=draw) / math.sqrt(fan)
        out[f"{name}_bias"] = torch.zeros(layers, shape[1] if dense else shape[0])
    mix = torch.randn(layers, 2 * size, 2, generator=draw) / (10 * math.sqrt(2 * size))
    out["mix"] = torch.cat([mix, torch.full((layers, 1, 2), GATE_AT_FIRST)], 1)  # its last row is the bias
    return out | {"gain": torch.ones(layers, pixels), "shift": torch.zeros(layers, pixels)}


def _rate(step: int, steps: int) -> float:
    """Learning-rate factor: up in some steps, then down along a cosine."""
    up = max(1, min(WARM_UP, steps // 10))
    return min(1.0, (step + 1) / up) * 0.5 * (1 + math.cos(math.pi * step / steps))
