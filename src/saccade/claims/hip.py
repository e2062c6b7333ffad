"""HiP: a tree search of log n levels finds nearly what an exact search would."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, captured, ceiling, machinery, mass
from saccade.claims._contract import Claim, Evidence
from saccade.core.budget import Budget
from saccade.core.selection import Gather
from saccade.measure.stats import mean_interval
from saccade.methods.sparse.hip import Hip
from saccade.methods.sparse.oracle_topk import OracleTopk
from saccade.methods.sparse.random import Random

CLAIM = Claim(
    says="A tree search finds a few hundred keys per block of queries, without training, that keep perplexity and"
    " retrieval close to dense attention.",
    where="arXiv 2406.09827, section 4, tables on PG-19 and LongBench; k = 512, first 3 layers dense",
    setting="Llama-3.1-8B and similar, 8k to 128k tokens",
    how="SmolLM2-135M at a quarter of the pairs, the three dense layers included: loss on the last 512 of 2,048"
    " tokens of real prose, pass keys at 1,024; against full, random blocks, and sinks and window of as many"
    " pairs (streaming). And the attention mass of its keys over that of the exact best keys per row, as"
    " many, in the layers that are not dense. Shorter and smaller than the paper: scaled down.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Perplexity within 3 %, pass keys within 10 points of full and 20 above streaming, better than random"
    " blocks, and 85 % of the exact search's mass.",
)
BUDGET = 0.25


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(Hip(query_block_tokens=8, window_tokens=8))
    text = Bench("loss", (2048,), 3, progress, tier=tier)
    keys = Bench("passkey", (1024,), 10, progress, (text.model, text.tokenizer), tier)
    ours, hits = text.scores("hip", BUDGET), keys.scores("hip", BUDGET)
    near = keys.scores("streaming", f"{Budget(BUDGET).row_tokens(*keys.lengths)}tok")
    masses = _masses(Subject(text.model), [s.context[:, :1024] for s in text.samples[-2:]])
    chance = text.scores("random:part=prefill", BUDGET)
    checks = [
        at_most("nats, minus full (3 %)", text.difference(ours, text.scores("full")), math.log(1.03)),
        at_least("nats, random blocks minus ours", text.difference(chance, ours), 0.02),
        at_least("pass keys, minus full", keys.difference(hits, keys.scores("full")), -0.10),
        at_least("pass keys, minus streaming", keys.difference(hits, near), 0.20),
        at_least("mass over the exact search's", mean_interval(masses["hip"]), 0.85),
    ]
    keys.scores("random:part=prefill", BUDGET)
    table = [{"who": who, "mass over the exact search's": sum(m) / len(m), "n": len(m)} for who, m in masses.items()]
    setting = (
        f"{text.where()}; {BUDGET} of the causal pairs over all layers, 3 of 30 dense; {text.what()}, {keys.what()};"
        " mass on two texts of 1,024 tokens"
    )
    exact = text.difference(text.scores("hip:rep=oracle", BUDGET), text.scores("full")).mean
    bound = ceiling(text, BUDGET, math.log(1.03))
    reason = f"{bound} HiP with an exact search in place of the tree: {exact:+.3f} nats."
    return Evidence(checks, setting, reason, table=text.rows() + keys.rows() + table)


def _masses(subject: Subject, texts: list[Tensor]) -> dict[str, list[float]]:
    """Per text and searched layer: attention mass of the selected keys over that of the exact best, as many per row."""
    exact, chance = OracleTopk(), Random(part="prefill")
    out: dict[str, list[float]] = {"hip": [], "hip:rep=oracle": [], "random": []}
    for site, q, k, v in captured(subject, texts, BUDGET):
        found = Hip().select(q, k, site)
        if not isinstance(found, Gather):
            continue
        # what a row of this layer may read, for the others too
        same = dataclasses.replace(site, budget=Budget(float(found.density().mean())))
        best = mass(q, k, v, exact.select(q, k, same), site)
        out["hip"].append(mass(q, k, v, found, site) / best)
        out["hip:rep=oracle"].append(mass(q, k, v, Hip(rep="oracle").select(q, k, site), site) / best)
        out["random"].append(mass(q, k, v, chance.select(q, k, same), site) / best)
    return out
