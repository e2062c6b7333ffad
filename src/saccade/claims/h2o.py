"""H2O: a few keys draw most of the attention, and a cache of these and the recent ones is enough."""

from __future__ import annotations

import torch

from saccade import ops
from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.measure.stats import mean_interval
from saccade.methods.cache.h2o import H2O

CLAIM = Claim(
    says="A fifth of the cache, half of it keys of largest accumulated attention and half recent keys, keeps the"
    " quality of the full cache; recent keys alone do not. Accumulated attention follows a power law.",
    where="arXiv 2306.14048, section 3 and figure 2; section 5.1, figure 4 and table 1",
    setting="OPT-6.7B to 175B, LLaMA, GPT-NeoX-20B; eight five-shot tasks of HELM and lm-eval-harness, summaries among"
    " them; 4 to 100 percent of the cache; A100 80 GB",
    how="SmolLM2-135M: loss of the last 512 of 1,024 tokens with a fifth of the cache throughout, against full, recent"
    " keys alone, heavy hitters alone, and random keys of the prompt with all later ones, which hold more; pass keys in"
    " 512 tokens, a fifth kept; share of all attention that the fifth of keys with the largest sums draws,"
    " mean over heads and layers. Scaled down in model and length.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Loss within 0.05 nats of full, 0.05 below recent keys alone; pass keys 30 points above random; a fifth of"
    " the keys draws four fifths of the attention.",
)
SHARE = 0.2
TEXTS, KEYS = 3, 10
RECENT, HEAVY = "streaming:sink_tokens=0", "h2o:heavy_share=1"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(H2O())
    text = Bench("continuation-loss", (1024,), TEXTS, progress, tier=tier)
    keys = Bench("passkey", (512,), KEYS, progress, (text.model, text.tokenizer), tier)
    ours, full, recent = text.scores("h2o", SHARE), text.scores("full"), text.scores(RECENT, SHARE)
    text.scores("random:part=evict", SHARE)
    alone = text.difference(text.scores(HEAVY, SHARE), full)
    found, chance = keys.scores("h2o", SHARE), keys.scores("random:part=evict", SHARE)
    checks = [
        at_most("h2o minus full, nats", text.difference(ours, full), 0.05),
        at_most("h2o minus recent keys alone, nats", text.difference(ours, recent), -0.05),
        at_least("h2o minus random, pass keys", keys.difference(found, chance), 0.30),
        at_least("attention that a fifth of the keys draws", mean_interval(_heaviest(text)), 0.8),
    ]
    lost = keys.difference(found, keys.scores("full")).mean
    reason = f"Heavy hitters with one recent key lose {alone.mean:+.3f} nats. Minus full, {lost:+.2f} pass keys."
    setting = f"{text.where()}; {text.what()}, {keys.what()}"
    return Evidence(checks, setting, reason, table=text.rows() + keys.rows())


@torch.no_grad()
def _heaviest(text: Bench) -> list[float]:
    """Per text: the share of all attention on the fifth of keys with the largest column sums."""
    out = []
    for sample in text.samples:
        whole = torch.cat([sample.context, sample.continuation], 1)
        shares = []
        for _, q, k, _ in Subject(text.model).capture_qkv([whole]):
            sums = ops.column_scores(q, k).sort(-1, descending=True).values
            shares.append(float((sums[..., : int(SHARE * k.shape[2])].sum(-1) / sums.sum(-1)).mean()))
        out.append(sum(shares) / len(shares))
    return out
