"""Gate training: which heads need the whole text, told by what the model's final states lose without it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from saccade.attach.listening import listening
from saccade.attach.probe import Spot
from saccade.core import rng
from saccade.core.errors import BadInput, CannotRun

if TYPE_CHECKING:
    from saccade.attach.calibration import Subject
    from saccade.methods.cache.duo_attention import DuoAttention

NATO = [
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima"),
    *("mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey"),
    *("xray", "yankee", "zulu"),
]
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
Progress = Callable[[int, int, str], None]  # done, total, what
SHORTEST = 1 / 32  # the paper's share: a text is between this of its sample (or what holds the keys) and all of it


class Gating:
    """Trains gates alpha [layers, g] of a frozen model by  mean (h_full - h_gated)^2 + weight mean |alpha|.

    A gated head gives  alpha full + (1 - alpha) streaming. The teacher forward is dense and leaves each head's full
    output for the student (`full_term="teacher"`), else the student computes its own. h: final states at the answers.
    """

    def __init__(self, subject: Subject, recipe: DuoAttention):
        if subject.found.sites[0].place.softcap is not None:
            raise CannotRun(f"train gates of {subject.name}", "its logits are capped, which the training kernel is not")
        self.subject, self.recipe = subject, recipe
        self.alpha = torch.ones(subject.layers, subject.kv_heads, device=subject.model.device, requires_grad=True)
        self.teaching = False
        self.full: dict[int, Tensor] = {}  # layer -> the teacher's full output

    def train(
        self, samples: Sequence[Tensor], progress: Progress | None = None
    ) -> tuple[Float[Tensor, "layers g"], dict[str, float]]:
        """The gates after a text for each step, and figures of the training."""
        recipe, draw = self.recipe, rng.python("gates/texts")
        optimiser = torch.optim.AdamW([self.alpha], lr=recipe.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: _rate(t, recipe.train_steps))
        losses: list[float] = []
        with frozen(self.subject.model), listening(self.subject.model, self.subject.found, self._listener):
            for step in range(recipe.train_steps):
                with torch.no_grad():
                    self.alpha.clamp_(0, 1)
                sample, size = draw.choice(samples), (recipe.train_keys, recipe.train_key_words)
                losses.append(self.step(*recall_text(self.subject.tokenizer, sample, draw, *size)))
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
                if progress is not None:
                    mean = self.alpha.detach().mean()
                    progress(step + 1, recipe.train_steps, f"distance {losses[-1]:.4f}, mean gate {mean:.3f}")
        gates = self.alpha.detach().clamp(0, 1).cpu()
        last = losses[-max(1, recipe.train_steps // 10) :]
        return gates, {"distance": sum(last) / len(last), **_separation(gates)}

    def step(self, ids: Int[Tensor, "1 n"], answers: Bool[Tensor, "1 n"]) -> float:
        """Gradient of the gates on one text; returns the distance part of the loss."""
        ids = ids.to(self.alpha.device)
        self.teaching = True
        with torch.no_grad():
            wanted = self._final(ids)[answers]
        self.teaching = False
        with torch.enable_grad():
            distance = (self._final(ids)[answers] - wanted).square().mean()
            (distance + self.recipe.gate_weight * self.alpha.abs().mean()).backward()
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
        gating, index, group = self.gating, self.place.layer, self.place.heads // self.place.kv_heads
        # one copy per query head: PyTorch's kernel without an n x n table does not know groups in float32
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        if gating.teaching:
            gating.full[index] = self._full(q, k, v)
            return gating.full[index]
        full = gating.full[index] if gating.recipe.full_term == "teacher" else self._full(q, k, v)
        near = streaming(q, k, v, gating.recipe.sink_tokens, gating.recipe.recent_tokens, self.place.scale)
        alpha = gating.alpha[index].repeat_interleave(group)[:, None, None]
        return (alpha * full + (1 - alpha) * near).to(q.dtype)

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True, scale=self.place.scale)


def streaming(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    sinks: int,
    recent: int,
    scale: float,
) -> Float[Tensor, "b h n d"]:
    """Attention where query i sees key j if j <= i and (j < sinks or i - j < recent), as the gates are trained.

    In blocks of `recent` queries, each over its own keys, those of the block before, and the sinks: time and memory are
    n (2 recent + sinks), not n^2.
    """
    n = q.shape[2]
    blocks = -(-n // recent)
    spare = blocks * recent - n
    asking = rearrange(pad(q, (0, 0, 0, spare)), "b h (m w) d -> (b m) h w d", w=recent)

    def near(x: Tensor) -> Tensor:
        bands = pad(x, (0, 0, recent, spare)).unfold(2, 2 * recent, recent)  # [b h m d 2w]
        first = x[:, :, None, :sinks].expand(-1, -1, blocks, -1, -1)
        return rearrange(torch.cat([first, bands.mT], 3), "b h m t d -> (b m) h t d")

    row = torch.arange(blocks * recent, device=q.device).view(blocks, recent, 1)
    band = torch.arange(-recent, recent, device=q.device) + row[:, :1]
    sunk = torch.arange(min(sinks, n), device=q.device).expand(blocks, 1, -1)
    allowed = torch.cat([row - sunk >= recent, (band >= 0) & (band <= row) & (row - band < recent)], -1)
    mask = allowed[:, None].repeat(q.shape[0], 1, 1, 1)
    out = sdpa(asking, near(k), near(v), mask, scale=scale)
    return rearrange(out, "(b m) h w d -> b h (m w) d", m=blocks)[:, :, :n]


def recall_text(
    tokenizer: Any, sample: Int[Tensor, "1 n"], draw: random.Random, keys: int, words: int, shortest: float = SHORTEST
) -> tuple[Int[Tensor, "1 m"], Bool[Tensor, "1 m"]]:
    """Pass keys hidden in a sample, asked for and answered after it; True at the tokens of the answers.

    shortest n <= m <= n, where the keys leave the choice.

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
    room = draw.randint(max(int(len(rows) * shortest), extra + keys), len(rows)) - extra
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


def _separation(gates: Float[Tensor, "layers g"]) -> dict[str, float]:
    """How clearly heads fall into two kinds: shares of gates near 1 and near 0, gap between the means of the halves."""
    high, low = (gates > 0.8).float().mean(), (gates < 0.2).float().mean()
    ranked = gates.flatten().sort().values
    gap = ranked[len(ranked) // 2 :].mean() - ranked[: len(ranked) // 2].mean() if len(ranked) > 1 else 0.0
    shares = {"near_1": high, "near_0": low, "decided": high + low, "gap_of_halves": gap, "mean_gate": gates.mean()}
    return {name: round(float(value), 4) for name, value in shares.items()}


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No weight collects gradients, no dropout; both as before afterwards."""
    before, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
