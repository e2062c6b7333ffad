"""HyperAttention: hash blocks and a weighted sample stand for most of a long prompt, with a moderate loss."""

from __future__ import annotations

import math

from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.core.budget import Budget
from saccade.core.site import Site
from saccade.methods.sparse.hyperattention import HyperAttention

CLAIM = Claim(
    says="Sorting by a hash finds the large entries and uniform sampling estimates the rest in near-linear time;"
    " patched into a pretrained model without training, perplexity grows slowly with the number of patched layers.",
    where="arXiv 2310.05869, section 4, figure 3 and table 1: ChatGLM2-6b-32k, 5.6 to 6.3 with all layers patched and"
    " inference 50 % faster",
    setting="32k tokens of LongBench, exact pieces of 4,096, blocks and samples of 256; the authors' script raises 2 to"
    " a loss in nats, so that 5.6 and 6.3 are about 12.0 and 14.2 as perplexity is usually said",
    how="SmolLM2-135M at 4,096 tokens of real prose, loss on the last 512; a quarter of the pairs in the last 5 and in"
    " all of 30 layers, the others dense; at most half of them in exact pieces, the rest in blocks and samples of equal"
    " size. At the same cost blocks alone, samples alone, and random blocks. Eight times shorter than the paper: scaled"
    " down. Speed is measured elsewhere.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Perplexity within 10 % with 5 layers patched and within the paper's 18 % (14.2 over 12.0) with all; better"
    " than hash blocks alone, than samples alone, and than random blocks by 0.02 nats.",
)
BUDGET, LAYERS = 0.25, 30
TOKENS = {"cpu": 4096, "gpu": 2048}  # of which a GPU reads four times as many: 8,192, the most that the model takes
OTHERS = {
    "hash blocks alone": HyperAttention(sample_tokens=0),
    "samples alone": HyperAttention(block_tokens=1, sample_tokens=1 << 20),  # blocks of one key
}


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(HyperAttention(block_tokens=4, sample_tokens=4, exact_tokens=16))
    text = Bench("loss", (TOKENS[tier],), 3, progress, tier=tier)
    full = text.scores("full")
    ours = {last: text.scores(HyperAttention(dense_layers=LAYERS - last), _budget(last)) for last in (5, LAYERS)}
    lost = {last: text.difference(scores, full) for last, scores in ours.items()}
    checks = [
        at_most("nats, last 5 layers, minus full (10 %)", lost[5], math.log(1.10)),
        at_most("nats, all layers, minus full (18 %)", lost[LAYERS], math.log(14.2 / 12.0)),
        at_least(
            "nats, random blocks minus ours, all layers",
            text.difference(text.scores("random:part=prefill", BUDGET), ours[LAYERS]),
            0.02,
        ),
    ]
    for name, other in OTHERS.items():
        found = text.difference(text.scores(other, BUDGET, name), ours[LAYERS])
        checks.append(at_least(f"nats, {name} minus ours, all layers", found, 0.0))
    setting = (
        f"{text.where()}; {text.what()}; {BUDGET} of the causal pairs in the patched layers: {_sizes(*text.lengths)}"
    )
    steps = ", ".join(f"{estimate.mean:+.3f} with {last} layers" for last, estimate in lost.items())
    return Evidence(checks, setting, f"Nats over full: {steps}.", table=text.rows())


def _sizes(tokens: int) -> str:
    """What a quarter of the pairs pays for, in words."""
    site = Site(0, LAYERS, 9, 3, 64, "prefill", tokens, tokens, tokens, 0.125, budget=Budget(BUDGET))
    exact, block, sample = HyperAttention()._sizes(site)
    return f"exact pieces of {exact}, blocks of {block}, samples of {sample}"


def _budget(last: int) -> float:
    """Of all layers, if the last so many are given a quarter and the others everything."""
    return (LAYERS - last + last * BUDGET) / LAYERS
