"""What claims on a real model share: samples of a task, scores of contestants on them, checks with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saccade import models, ops, tasks
from saccade.attach import attach, calibration, fingerprint
from saccade.attach.compat import CACHE
from saccade.claims._contract import SEED, Check, Evidence, Progress
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.method import Method
from saccade.core.selection import Selection, dense
from saccade.core.site import Site
from saccade.measure.contestants import Contestant, parse
from saccade.measure.score import Subject, quality
from saccade.measure.stats import Estimate, hit_rate, mean_interval, paired

Spec = str | Method
Captured = tuple[Site, Tensor, Tensor, Tensor]
PROMPT = 64  # tokens of the smoke tier's prompt


@dataclass(frozen=True)
class Tier:
    """Where a tier measures, and how many times what the cpu tier does."""

    device: str
    dtype: str
    longer: int  # texts
    more: int  # samples

    def load(self) -> tuple[Any, Any]:
        """The model that is measured, and its tokenizer."""
        return models.load("smollm2", self.dtype, self.device)

    def where(self) -> str:
        """Model, number format and device, for the setting of a claim."""
        return f"SmolLM2-135M-Instruct, {self.dtype}" + (" on a GPU" if self.device == "cuda" else "")


TIERS = {"cpu": Tier("cpu", "float32", 1, 1), "gpu": Tier("cuda", "bfloat16", 4, 3)}


class Bench:
    """One model, and the samples of a task at some lengths; each contestant is scored once on each sample.

    lengths, count: at tier "cpu"; a GPU reads longer texts, and more of them
    """

    def __init__(
        self, task: str, lengths: Sequence[int], count: int, progress: Progress | None, loaded: Any = None,
        tier: str = "cpu",
    ):  # fmt: skip
        self.tier = TIERS[tier]
        self.model, self.tokenizer = loaded or self.tier.load()
        self.task, self.progress = tasks.get(task), progress
        self.lengths, self.count = tuple(n * self.tier.longer for n in lengths), count * self.tier.more
        self.samples = [s for n in self.lengths for s in self.task.samples(self.tokenizer, n, self.count, SEED)]
        self.mark = fingerprint(self.model)
        self.done: dict[tuple[str, str], list[float]] = {}

    def where(self) -> str:
        """Model, number format and device, for the setting of a claim."""
        return self.tier.where()

    def what(self) -> str:
        """Samples and lengths, for the setting of a claim."""
        return f"{self.count} of {self.task.name} each at " + " and ".join(f"{n:,}" for n in self.lengths) + " tokens"

    def scores(self, spec: Spec, budget: float | str = 1.0, name: str = "") -> list[float]:
        """Score of each sample, in order. `name` tells methods apart that differ in their artefact only."""
        who, budget = parse(spec).equipped(self.mark), Budget.of(budget)
        key = (name or who.label, str(budget))
        if key not in self.done:
            if self.progress is not None:
                self.progress(len(self.done), len(self.done) + 1, f"{key[0]} at {key[1]}: {self.task.name}")
            self.done[key] = self._score(who, budget)
        return self.done[key]

    def _score(self, who: Contestant, budget: Budget) -> list[float]:
        subject = Subject(self.model, self.tokenizer)
        return [s["score"] for s in quality(subject, who, budget, self.task, self.samples, SEED)["samples"]]

    def difference(self, ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
        """Ours minus theirs, over the same samples."""
        return paired(ours, theirs, self.task.metric == "hit")

    def rows(self) -> list[dict[str, Any]]:
        """All that was scored, for the table."""
        estimate = hit_rate if self.task.metric == "hit" else mean_interval
        out = []
        for (who, budget), values in self.done.items():
            e = estimate(values)
            row = {"task": self.task.name, "who": who, "budget": budget, "n": e.n, "mean": e.mean}
            out.append(row | {"low": e.low, "high": e.high})
        return out


def prefill(
    ours: Spec, budget: float, tier: str, progress: Progress | None
) -> tuple[Bench, Bench, dict[str, list[float]], dict[str, list[float]]]:
    """What methods of a sparse prefill are asked: loss on prose, and pass keys; their benches, and the scores of ours,
    full, random blocks, and sinks with a window ("near"), all of as many pairs."""
    text = Bench("loss", (2048,), 3, progress, tier=tier)
    keys = Bench("passkey", (1024,), 10, progress, (text.model, text.tokenizer), tier)
    found = []
    for bench in (text, keys):
        near = f"{Budget(budget).row_tokens(*bench.lengths)}tok"
        asked = {"ours": (ours, budget), "random": ("random:part=prefill", budget), "near": ("streaming", near)}
        found.append({"full": bench.scores("full")} | {who: bench.scores(*what) for who, what in asked.items()})
    return text, keys, *found


def at_least(name: str, found: Estimate, bar: float) -> Check:
    """Holds if the mean reaches the bar."""
    return _check(name, found, bar, found.mean >= bar)


def at_most(name: str, found: Estimate, bar: float) -> Check:
    """Holds if the mean stays within the bar."""
    return _check(name, found, bar, found.mean <= bar)


def _check(name: str, found: Estimate, bar: float, holds: bool) -> Check:
    return Check(name, found.mean, found.low, found.high, bar, holds, found.n, found.smallest_effect)


def ceiling(text: Bench, budget: float, bar: float) -> str:
    """What the exact best keys of each row lose, as many pairs, in nats: the part that no selection can win back."""
    lost = text.difference(text.scores("oracle-topk", budget), text.scores("full")).mean
    blame = "so few keys are not enough here, however chosen" if lost > bar else "so the keys are there to be found"
    return f"The exact top keys of every row, as many pairs, lose {lost:+.3f} nats themselves: {blame}."


def captured(subject: calibration.Subject, texts: Sequence[Tensor], budget: float) -> Iterator[Captured]:
    """Site, q, k, v of the prefill of every text in every layer."""
    places = {spot.place.layer: dataclasses.asdict(spot.place) for spot in subject.found.sites}
    for layer, q, k, v in subject.capture_qkv(texts):
        n = q.shape[2]
        yield Site(**places[layer], stage="prefill", queries=n, keys=n, seen=n, budget=Budget(budget)), q, k, v


def mass(q: Tensor, k: Tensor, v: Tensor, selection: Selection, site: Site) -> float:
    """Mean attention mass of the selected keys, over heads and rows."""
    part, whole = (ops.attend(q, k, v, s, scale=site.scale)[1] for s in (selection, dense(site.queries, site.keys)))
    return float(torch.exp((part - whole).double()).mean())


@torch.no_grad()
def kept_mass(model: Any, samples: Sequence[Any], method: Method, budget: float) -> list[float]:
    """Per sample: the share of the answer's attention to the prompt that falls on the keys that the method keeps."""
    out = []
    for sample in samples:
        with attach(model, method, budget=budget) as run:
            model(sample.context.to(model.device), use_cache=True)
            kept = [run.record.layer(i).kept[0] for i in sorted(run.record.layers)]
        n = sample.context.shape[1]
        shares = []
        whole = torch.cat([sample.context, sample.continuation], 1)
        for layer, q, k, _ in calibration.Subject(model).capture_qkv([whole]):
            paid = _paid(q, k, n)
            shares += [float(row[head.long()].sum() / row.sum()) for row, head in zip(paid.cpu(), kept[layer])]
        out.append(sum(shares) / len(shares))
    return out


def _paid(q: Float[Tensor, "1 h n d"], k: Float[Tensor, "1 g n d"], prompt: int) -> Float[Tensor, "g p"]:
    """Attention that the tokens after the prompt pay to each of its keys, summed over them and over a group's heads."""
    grouped = q[0, :, prompt:].float().unflatten(0, (k.shape[1], -1))
    logits = grouped @ k[0, :, None].float().mT * q.shape[-1] ** -0.5
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(prompt + 1)
    return logits.masked_fill(ahead, -torch.inf).softmax(-1)[..., :prompt].sum((1, 2))


def machinery(method: Method, budget: float = 0.5) -> Evidence:
    """The smoke tier: on a tiny random model a full budget changes nothing, and a smaller one is kept and bites.

    It says nothing about the paper; quality needs a trained model.
    """
    model = models.tiny("llama").double()
    method = dataclasses.replace(method, artefact=method.artefact and _stamped(method, model))
    ids = torch.randint(3, models.families.VOCAB, (1, 96), generator=rng.generator("smoke"))
    dense = logits(model, ids)
    with attach(model, method, budget=1.0):
        same = float((logits(model, ids) - dense).abs().max())
    with attach(model, method, budget=budget) as run:
        other = float((logits(model, ids) - dense).abs().max())
        used = run.record.density("prefill" if "prefill" in method.parts else "decode")
        if "evict" in method.parts:
            logits(model, ids[:, :PROMPT])
            used = run.record.kept_fraction
    with attach(model, parse(f"random:part={method.parts[-1]}").methods[0], budget=budget):
        chance = float((logits(model, ids) - dense).abs().max())
    rounding = float((logits(model.float(), ids).double() - dense).abs().max())
    checks = [
        Check("full budget: largest difference from dense", same, same, same, rounding, same <= rounding),
        Check(f"budget {budget}: share used", used, used, used, budget, used <= budget),
        Check(f"budget {budget}: largest difference from dense", other, other, other, rounding, other > rounding),
    ]
    table = [{"who": "full", "difference": 0.0}, {"who": "random", "difference": chance}]
    return Evidence(checks, "tiny random Llama, 96 tokens: the machinery, not the paper", table=table)


def _stamped(method: Method, model: Any) -> Any:
    return dataclasses.replace(method.artefact, fingerprint=fingerprint(model))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """A prompt, and what follows it on the same cache."""
    first = model(ids[:, :PROMPT], use_cache=True)
    if ids.shape[1] == PROMPT:
        return first.logits
    rest = model(ids[:, PROMPT:], **{CACHE: first[CACHE]}, use_cache=True)
    return torch.cat([first.logits, rest.logits], 1)
