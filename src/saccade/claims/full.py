"""Full attention, attached: the attachment itself changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade import models
from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.claims._bench import Bench, Progress
from saccade.claims._contract import Check, Claim, Evidence
from saccade.core import rng

CLAIM = Claim(
    says="A model attached with no method computes what it computes alone, prompt and later tokens.",
    where="our own statement, on which every comparison rests",
    setting="any served model",
    how="Logits of SmolLM2-135M on real prose, attached and alone: a prompt, then the rest on its cache. Random keys"
    " beside it, to show that the figure can be large.",
    counts="The largest difference is within twice the model's own rounding error, float32 against float64.",
)


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke" or "cpu"."""
    if tier == "smoke":
        model = models.tiny("llama")
        draws = [rng.generator("smoke", 0, i) for i in (0, 1)]
        texts = [torch.randint(3, models.families.VOCAB, (1, 96), generator=draw) for draw in draws]
        setting = "tiny random Llama, float32, 2 rows of 96 tokens"
    else:
        bench = Bench("continuation-loss", (256,), 4, progress)
        model, texts = bench.model, [sample.context for sample in bench.samples]
        setting = "SmolLM2-135M-Instruct, float32, 4 texts of 256 tokens"
    alone = [_logits(model, ids) for ids in texts]
    found = {}
    for name, budget in (("full", 0.25), ("random", 0.25)):
        with attach(model, name, budget=budget):
            found[name] = [_logits(model, ids) for ids in texts]
    model.double()
    exact = [_logits(model, ids) for ids in texts]
    model.float()
    rounding = 2 * max(_difference(exact, alone))
    off, chance = _difference(found["full"], alone), _difference(found["random"], alone)
    checks = [
        Check("largest difference, full", max(off), min(off), max(off), rounding, max(off) <= rounding),
        Check("difference, random keys", min(chance), min(chance), max(chance), rounding, min(chance) > rounding),
    ]
    table = [{"who": "full", "difference": max(off)}, {"who": "random", "difference": max(chance)}]
    return Evidence(checks, setting, table=table)


@torch.no_grad()
def _logits(model, ids: Tensor) -> Tensor:
    half = ids.shape[1] // 2
    first = model(ids[:, :half], use_cache=True)
    rest = model(ids[:, half:], **{CACHE: first[CACHE]}, use_cache=True)
    return torch.cat([first.logits, rest.logits], 1)


def _difference(a: list[Tensor], b: list[Tensor]) -> list[float]:
    return [float((x - y).abs().max()) for x, y in zip(a, b)]
