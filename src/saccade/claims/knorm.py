"""L2 norm: keys of low norm are those that are attended to."""

from __future__ import annotations

from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.methods.cache.knorm import KNorm

CLAIM = Claim(
    says="Keeping the keys of lowest norm halves the cache without loss in language modelling and needle"
    " retrieval, and keeps pass keys with a tenth of it.",
    where="arXiv 2406.11430, abstract and figures 3 to 5",
    setting="Llama-2-7B, Llama-3-8B, Gemma; up to 32k tokens; layers 0 and 1 whole",
    how="SmolLM2-135M: loss of 512 tokens after 512 at half the cache, and pass keys at a half and a quarter, two"
    " layers whole inside the budget; against full, random and streaming caches of the same size.",
    tiers=("smoke", "cpu", "gpu"),
    counts="At half the cache the loss within 0.05 nats of full, pass keys within 5 points; better than random keys.",
)
OURS = "knorm:dense_layers=2"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(KNorm())
    text = Bench("continuation-loss", (1024,), 6, progress, tier=tier)
    keys = Bench("passkey", (512,), 10, progress, (text.model, text.tokenizer), tier)
    for bench in (text, keys):
        for baseline in ("random:part=evict", "streaming"):
            bench.scores(baseline, 0.5)
    ours, kept = text.scores(OURS, 0.5), keys.scores(OURS, 0.5)
    keys.scores(OURS, 0.25)
    checks = [
        at_most("half the cache minus full, nats", text.difference(ours, text.scores("full")), 0.05),
        at_least("half the cache minus full, pass keys", keys.difference(kept, keys.scores("full")), -0.05),
        at_least("minus random, pass keys", keys.difference(kept, keys.scores("random:part=evict", 0.5)), 0.30),
    ]
    setting = f"{text.where()}; {text.what()}, {keys.what()}; half the keys kept"
    return Evidence(checks, setting, table=text.rows() + keys.rows())
