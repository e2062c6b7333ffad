"""MInference: a quarter of the prefill's pairs, found per head and per prompt, are enough."""

from __future__ import annotations

import dataclasses
import math

import torch

from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, captured, ceiling, machinery, mass
from saccade.claims._contract import Claim, Evidence
from saccade.core.artefact import Artefact
from saccade.core.errors import CannotRun
from saccade.measure.stats import hit_rate
from saccade.methods.sparse.minference import CANDIDATES, MInference

CLAIM = Claim(
    says="Each head has one of three shapes, the same for all prompts; computing only its lines, found from the last 64"
    " queries, keeps perplexity and retrieval, where sinks and window alone (A-shape) lose retrieval.",
    where="arXiv 2407.02490, sections 2 and 4, tables 2 and 3, figures 3 and 6",
    setting="Llama-3-8B-262k and others, 1,000 columns and 6,096 diagonals of 30k to 1M tokens, one A100",
    how="SmolLM2-135M with the shipped patterns at a quarter of the causal pairs: loss on the last 512 of 2,048"
    " tokens of real prose, pass keys at 1,024; against full, random blocks and A-shape at the same density; and the"
    " search repeated on two texts of 1,024 tokens. 15 to 500 times shorter than the paper, where attention is less"
    " sparse: scaled down. Speed is measured elsewhere.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Perplexity within 2 %, pass keys within 5 points of full and 20 above A-shape, better than random blocks,"
    " and 70 % of the heads of the same shape on both texts.",
)
BUDGET = 0.25


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(MInference(recent_tokens=8, sink_tokens=4))
    text = Bench("loss", (2048,), 3, progress, tier=tier)
    made = Artefact.find("minference", text.mark)
    if made is None:
        raise CannotRun("claim minference", "no patterns were searched for SmolLM2", "saccade calibrate minference")
    keys = Bench("passkey", (1024,), 10, progress, (text.model, text.tokenizer), tier)
    ends = MInference(artefact=_all("spans", made))
    everyone = ("full", "ours", "random", "ends")
    losses, hits = ({who: _scores(bench, who, ends) for who in everyone} for bench in (text, keys))
    checks = [
        at_most("nats, minus full (2 %)", text.difference(losses["ours"], losses["full"]), math.log(1.02)),
        at_least("nats, random blocks minus ours", text.difference(losses["random"], losses["ours"]), 0.02),
        at_least("pass keys, minus full", keys.difference(hits["ours"], hits["full"]), -0.05),
        at_least("pass keys, minus A-shape", keys.difference(hits["ours"], hits["ends"]), 0.20),
    ]
    searched = [MInference().calibrate(Subject(text.model), [s.context[:, :1024]]) for s in text.samples[-2:]]
    same = [float(a == b) for a, b in zip(*(_shapes(found) for found in searched))]
    checks.append(at_least("heads of one shape on two texts", hit_rate(same), 0.7))
    table = [
        {"shape": c.shape, "first": c.first, "second": c.second, "kept mass": m, "best in heads": n}
        for c, m, n in zip(CANDIDATES, made.figures["kept_mass"], made.figures["heads"])
    ]
    setting = (
        f"{text.where()}; {text.what()}, {keys.what()}; {BUDGET} of the causal pairs in every head; patterns from"
        f" {made.data}"
    )
    first, others = _mass_by_layer(text, made)
    reason = (
        f"{ceiling(text, BUDGET, math.log(1.02))} The lines keep {first:.2f} of the attention mass in layer 0, which"
        f" attends broadly, and {others:.2f} in the others."
    )
    return Evidence(checks, setting, reason, table=text.rows() + keys.rows() + table)


def _mass_by_layer(text: Bench, made: Artefact) -> tuple[float, float]:
    """Attention mass of our selection in the first layer, and the mean of the other layers."""
    ours = MInference(artefact=made)
    context = text.samples[-1].context[:, :1024]
    layers = captured(Subject(text.model), [context], BUDGET)
    first, *others = [mass(q, k, v, ours.select(q, k, site), site) for site, q, k, v in layers]
    return first, sum(others) / len(others)


def _scores(bench: Bench, who: str, ends: MInference) -> list[float]:
    """Of one contestant, at the claim's density."""
    if who == "full":
        return bench.scores("full")
    if who == "ends":
        return bench.scores(ends, BUDGET, "A-shape only")
    return bench.scores("minference" if who == "ours" else "random:part=prefill", BUDGET)


def _all(shape: str, made: Artefact) -> Artefact:
    """Patterns in which every head has the first candidate of one shape."""
    number = next(i for i, c in enumerate(CANDIDATES) if c.shape == shape)
    return dataclasses.replace(made, tensors={"pattern": torch.full_like(made.tensors["pattern"], number)})


def _shapes(found: Artefact) -> list[str]:
    return [CANDIDATES[i].shape for i in found.tensors["pattern"].flatten().tolist()]
