"""SEA: the map that a small net draws shows which quarter of the pairs is enough, better than blind ones do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saccade.attach.calibration import Subject
from saccade.attach.estimating import first_weights, spread
from saccade.claims._bench import TIERS, Bench, Progress, at_least, at_most, captured, ceiling, machinery, mass
from saccade.claims._contract import SEED, Claim, Evidence
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import CannotRun
from saccade.core.selection import causal_mask
from saccade.measure.stats import Estimate, mean_interval
from saccade.methods.sparse.scatterbrain import Scatterbrain
from saccade.methods.sparse.sea import Sea, estimate
from saccade.tasks import passage

CLAIM = Claim(
    says="With an estimated map, sparse attention distilled from a dense model keeps its perplexity (25.9 for OPT-125M,"
    " dense 25.16), where linear attention (Performer, 49.8) and hashing (Reformer, 73.7) lose it.",
    where="arXiv 2310.01777, section 4, table 1: WikiText-2 by OPT of 125 million to 1.3 billion weights",
    setting="all weights trained by distillation, 256 pixels a row, 64 tokens a query and head of up to 2,048",
    how="SmolLM2-135M, its weights frozen, with the shipped estimators of 64 pixels: loss on the last 256 of 512 tokens"
    " of real prose that they were not trained on, at a quarter of the causal pairs; against full, random blocks, sinks"
    " and a window of as many keys, positive random features and keys by hashing, the last four untrained. In every"
    " layer of one text: the correlation of the estimated map with the model's, and the attention mass on what is kept."
    " Less is trained, and for far fewer steps: scaled down.",
    counts="Perplexity within 5 % of full; features lose more than 1.5 times what it loses; better than hashing, sinks"
    " and window, and random blocks by 0.02 nats; correlation above 0.5, four fifths of the mass.",
    tiers=("smoke", "cpu", "gpu"),
)
BUDGET, TOKENS, COUNT = 0.25, 512, 3


def measured_places(tokenizer: Any) -> list[tuple[int, int]]:
    """Which tokens of the shipped text are measured at some tier: estimators are not to be trained on them."""
    sizes = [(TOKENS * tier.longer, COUNT * tier.more) for tier in TIERS.values()]
    taken = {at for n, many in sizes for i in range(many) for at in _passage(tokenizer, n, i)}
    first = sorted(at for at in taken if at - 1 not in taken)
    return list(zip(first, sorted(at + 1 for at in taken if at + 1 not in taken)))


def _passage(tokenizer: Any, tokens: int, index: int) -> range:
    start = passage(tokenizer, tokens, index, SEED)[1]
    return range(start, start + tokens)


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(Sea(artefact=Artefact("sea", first_weights(2, 4, 16, Sea().pixels), "tiny", "")))
    text = Bench("loss", (TOKENS,), COUNT, progress, tier=tier)
    made = Artefact.find("sea", text.mark)
    if made is None:
        do = "Train them on a GPU in minutes: benchmarks/train_sea.py says how."
        raise CannotRun("claim sea", "no estimators were trained for SmolLM2", do)
    sea = Sea(artefact=made, pixels=made.options["pixels"])
    full, ours = text.scores("full"), text.scores(sea, BUDGET, "sea")
    others = {
        "features": text.scores(Scatterbrain(exact_share=0.0), BUDGET, "random features"),
        "hashing": text.scores(Scatterbrain(exact_share=1.0), BUDGET, "keys by hashing"),
        "sinks and window": text.scores("streaming", f"{Budget(BUDGET).row_tokens(*text.lengths)}tok"),
        "random blocks": text.scores("random:part=prefill", BUDGET),
    }
    features = others.pop("features")
    margin = mean_interval([(a - f) - 1.5 * (b - f) for a, b, f in zip(features, ours, full)])
    alike, kept = _maps(text, sea)
    checks = [
        at_most("nats, minus full (5 %)", text.difference(ours, full), math.log(1.05)),
        at_least("nats lost by features minus 1.5 times ours", margin, 0.0),
    ]
    for name, scores in others.items():
        bar = 0.02 if name == "random blocks" else 0.0
        checks.append(at_least(f"nats, {name} minus ours", text.difference(scores, ours), bar))
    checks += [
        at_least("correlation of the estimated map", alike, 0.5),
        at_least("attention mass of what is kept", kept, 0.8),
    ]
    setting = f"{text.where()}; {text.what()}; {BUDGET} of the causal pairs; estimators from {made.data}"
    reason = ceiling(text, BUDGET, math.log(1.05))
    return Evidence(checks, setting, reason, table=[*text.rows(), dict(made.figures)])


def _maps(text: Bench, sea: Sea) -> tuple[Estimate, Estimate]:
    """Over the layers of a text: correlation of the maps, over their causal pairs, and mass of the kept pairs."""
    found = list(_of_layers(text, sea))
    alike, kept = zip(*found)
    return mean_interval(alike), mean_interval(kept)


@torch.no_grad()
def _of_layers(text: Bench, sea: Sea) -> Iterator[tuple[float, float]]:
    for site, q, k, v in captured(Subject(text.model), [text.samples[-1].context], BUDGET):
        image, _ = estimate(q, k, v, sea._weights(site.layer, q.device), site)
        seen = causal_mask(site.queries, site.keys, q.device)
        logits = q.float() @ k.float().repeat_interleave(site.group, 1).mT * site.scale
        maps = [x.masked_fill(~seen, -torch.inf).softmax(-1) for x in (logits, spread(image))]
        kept = sea.select(q, k, dataclasses.replace(site, handed={"image": image}))
        yield _correlation(*maps), mass(q, k, v, kept, site)


def _correlation(one: Tensor, other: Tensor) -> float:
    seen = causal_mask(*one.shape[-2:], one.device).expand_as(one)
    return float(torch.corrcoef(torch.stack([one[seen], other[seen]]))[0, 1])
