"""FlexPrefill: shapes and sizes told from the prompt itself do what searched patterns of fixed sizes do, or better."""

from __future__ import annotations

import math

from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, captured, ceiling, machinery, mass, prefill
from saccade.claims._contract import Claim, Evidence
from saccade.measure.stats import paired
from saccade.methods.sparse.flexprefill import Flexprefill
from saccade.methods.sparse.minference import MInference
from saccade.methods.sparse.random import Random

CLAIM = Claim(
    says="With shapes and numbers of blocks found per head and prompt, RULER and InfiniteBench stay at the level of"
    " full attention, and are better at equal speed than with MInference's searched patterns or sinks and window.",
    where="arXiv 2502.20766, section 4, tables 1 and 2, figure 4",
    setting="Llama-3.1-8B, GLM-4-9B, Yi-9B and Qwen2-7B, 4k to 128k tokens; gamma 0.9 or 0.95, tau 0.1",
    how="SmolLM2-135M at a quarter of the causal pairs: loss on the last 512 of 2,048 tokens of real prose, pass keys"
    " at 1,024; against full, random blocks, sinks and window of as many pairs (streaming), and MInference (loss only)."
    " And the attention mass of the pairs, by layer, against MInference's lines in every head. 2 to 60 times shorter"
    " than the paper, where attention is less sparse: scaled down. Speed is measured elsewhere.",
    counts="Perplexity within 3 %, pass keys within 10 points of full and 20 above streaming, better than random blocks"
    " and than streaming, and no less attention mass than MInference's lines.",
    tiers=("smoke", "cpu", "gpu"),
)
BUDGET = 0.25


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(Flexprefill())
    text, keys, losses, hits = prefill("flexprefill", BUDGET, tier, progress)
    masses = _masses(text)
    checks = [
        at_most("nats, minus full (3 %)", text.difference(losses["ours"], losses["full"]), math.log(1.03)),
        at_least("nats, random blocks minus ours", text.difference(losses["random"], losses["ours"]), 0.02),
        at_least("nats, streaming minus ours", text.difference(losses["near"], losses["ours"]), 0.0),
        at_least("pass keys, minus full", keys.difference(hits["ours"], hits["full"]), -0.10),
        at_least("pass keys, minus streaming", keys.difference(hits["ours"], hits["near"]), 0.20),
        at_least("attention mass, minus MInference's lines", paired(masses["ours"], masses["lines"], False), 0.0),
    ]
    text.scores("minference", BUDGET)
    table = [{"who": who, "attention mass": sum(m) / len(m), "n": len(m)} for who, m in masses.items()]
    done = f"{text.what()}, {keys.what()}; mass on a text of 1,024 tokens"
    setting = f"{text.where()}; {done}; {BUDGET} of the causal pairs"
    return Evidence(checks, setting, ceiling(text, BUDGET, math.log(1.03)), table=text.rows() + keys.rows() + table)


def _masses(text: Bench) -> dict[str, list[float]]:
    """By layer: attention mass of our pairs, of either shape alone, and of others at the same density."""
    methods = {
        "ours": Flexprefill(),
        "columns and diagonals only": Flexprefill(tau=0.0),
        "query-aware only": Flexprefill(tau=1.0),
        "lines": MInference(),
        "random": Random(part="prefill"),
    }
    out: dict[str, list[float]] = {who: [] for who in methods}
    for site, q, k, v in captured(Subject(text.model), [text.samples[-1].context[:, :1024]], BUDGET):
        for who, method in methods.items():
            out[who].append(mass(q, k, v, method.select(q, k, site), site))
    return out
