"""Gate training: which heads need the whole text, told by what the model's final states lose without it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from saccade.attach.listening import listening
from saccade.attach.probe import Spot
from saccade.core import rng
from saccade.core.errors import BadInput, CannotRun
from saccade.core.selection import Spans

if TYPE_CHECKING:
    from saccade.attach.calibration import Subject

NATO = [
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima"),
    *("mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey"),
    *("xray", "yankee", "zulu"),
]
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
Progress = Callable[[int, int, str], None]  # done, total, what
KEYS, WORDS = 5, 8  # pass keys in a text, and words of each; the paper's are 10 and 32
SHORTEST = 0.5  # a text is between this share of its sample and the whole of it


class Gating:
    """Trains gates alpha [layers, g] of a frozen model by  mean (h_full - h_gated)^2 + weight mean |alpha|.

    A gated head gives  alpha full + (1 - alpha) streaming. The teacher forward is dense and leaves each head's full
    output for the student (`full_term="teacher"`), else the student computes its own. h: final states at the answers.
    """

    def __init__(
        self,
        subject: Subject,
        sink_tokens: int,
        recent_tokens: int,
        full_term: Literal["teacher", "student"],
        gate_weight: float,
    ):
        if subject.found.sites[0].place.softcap is not None:
            raise CannotRun(f"train gates of {subject.name}", "its logits are capped, which the training kernel is not")
        self.subject, self.full_term, self.gate_weight = subject, full_term, gate_weight
        self.sinks, self.recent = sink_tokens, recent_tokens
        self.alpha = torch.ones(subject.layers, subject.kv_heads, device=subject.model.device, requires_grad=True)
        self.teaching = False
        self.full: dict[int, Tensor] = {}  # layer -> the teacher's full output

    def train(
        self, samples: Sequence[Tensor], steps: int, learning_rate: float, progress: Progress | None = None
    ) -> tuple[Float[Tensor, "layers g"], dict[str, float]]:
        """The gates after `steps` texts, and the losses on the way."""
        draw = rng.python("gates/texts")
        optimiser = torch.optim.AdamW([self.alpha], lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: _rate(t, steps))
        losses: list[float] = []
        with _frozen(self.subject.model), listening(self.subject.model, self.subject.found, self._listener):
            for step in range(steps):
                with torch.no_grad():
                    self.alpha.clamp_(0, 1)
                text = recall_text(self.subject.tokenizer, draw.choice(samples), draw)
                losses.append(self.step(*text))
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
                if progress is not None:
                    progress(step + 1, steps, f"distance {losses[-1]:.4f}, mean gate {self.alpha.detach().mean():.3f}")
        gates = self.alpha.detach().clamp(0, 1)
        last = losses[-max(1, steps // 10) :]
        decided = ((gates < 0.2) | (gates > 0.8)).float().mean()
        return gates, {"distance": sum(last) / len(last), "mean_gate": float(gates.mean()), "decided": float(decided)}

    def step(self, ids: Int[Tensor, "1 n"], answers: Bool[Tensor, "1 n"]) -> float:
        """Gradient of the gates on one text; returns the distance part of the loss."""
        ids = ids.to(self.alpha.device)
        self.teaching = True
        with torch.no_grad():
            wanted = self._final(ids)[answers]
        self.teaching = False
        with torch.enable_grad():
            distance = (self._final(ids)[answers] - wanted).square().mean()
            (distance + self.gate_weight * self.alpha.abs().mean()).backward()
        return float(distance.detach())

    def _final(self, ids: Tensor) -> Float[Tensor, "1 n c"]:
        return self.subject.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()

    def _listener(self, spot: Spot) -> _Gate:
        return _Gate(self, spot)


class _Gate:
    """One module's attention under its gates."""

    def __init__(self, gating: Gating, spot: Spot):
        self.gating, self.place, self.run = gating, spot.place, SimpleNamespace(title="gate training")

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        gating, index = self.gating, self.place.layer
        if gating.teaching:
            gating.full[index] = self._attend(q, k, v, None)
            return gating.full[index]
        full = gating.full[index] if gating.full_term == "teacher" else self._attend(q, k, v, None)
        near = self._attend(q, k, v, streaming_mask(q.shape[2], gating.sinks, gating.recent, q.device))
        alpha = gating.alpha[index].repeat_interleave(self.place.heads // self.place.kv_heads)[:, None, None]
        return (alpha * full + (1 - alpha) * near).to(q.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa(q, k, v, mask, is_causal=mask is None, scale=self.place.scale, enable_gqa=True)


def streaming_mask(n: int, sinks: int, recent: int, device: torch.device) -> Bool[Tensor, "n n"]:
    """allowed(i, j) = j <= i and (j < sinks or i - j < recent), as the gates are trained."""
    one = torch.ones(1, dtype=torch.long, device=device)
    return Spans(sinks=sinks * one, window=recent * one, queries=n, keys=n).mask()[0, 0]


def recall_text(
    tokenizer: Any, sample: Int[Tensor, "1 n"], draw: random.Random, keys: int = KEYS, words: int = WORDS
) -> tuple[Int[Tensor, "1 m"], Bool[Tensor, "1 m"]]:
    """Pass keys hidden in a sample, asked for and answered after it; True at the tokens of the answers. m <= n.

    Raises:
        BadInput: the sample is too short to hold the keys.
    """
    secrets = [" ".join(draw.choices(NATO, k=words)) for _ in range(keys)]

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    needles = [tokens(f"\nRemember this: the {o} pass key is {s}.\n") for o, s in zip(ORDINALS, secrets)]
    asked = [tokens(f"\nWhat is the {o} pass key? The {o} pass key is") for o in ORDINALS[:keys]]
    answers = [tokens(f" {s}.") for s in secrets]
    rows = sample[0].tolist()
    extra = sum(map(len, (*needles, *asked, *answers)))
    if len(rows) < extra + keys:
        raise BadInput(
            f"a recall text of {len(rows)} tokens",
            f"{keys} pass keys and their questions take {extra}",
            f"Give samples of at least {extra + keys} tokens; twice that leaves room between the keys.",
        )
    room = draw.randint(max(int(len(rows) * SHORTEST), extra + keys), len(rows)) - extra
    cuts = sorted(draw.randint(0, room) for _ in range(keys))
    text: list[int] = []
    for start, end, needle in zip([0, *cuts], cuts, needles):
        text += rows[start:end] + needle
    text += rows[cuts[-1] : room]
    label = [False] * len(text)
    for question, answer in zip(asked, answers):
        text += question + answer
        label += [False] * len(question) + [True] * len(answer)
    return torch.tensor([text]), torch.tensor([label])


def _rate(step: int, steps: int) -> float:
    """Learning-rate factor: a fifth of the steps up, a fifth down, never below a tenth."""
    ramp = max(1.0, steps / 5)
    return min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No weight collects gradients, no dropout; both as before afterwards."""
    before, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
