"""PyramidKV: attention gathers on fewer keys in higher layers, so the budget may fall from layer to layer."""

from __future__ import annotations

from typing import Any

import torch

from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.measure.stats import mean_interval
from saccade.methods.cache.pyramidkv import PyramidKV

CLAIM = Claim(
    says="Attention is spread out in low layers and gathers on few keys in high ones; budgets that fall accordingly"
    " answer like the full cache with 12 % of it, and better than even ones where less than 1 % is kept.",
    where="arXiv 2406.02069, abstract; section 3, figure 2; section 5.2, table 1 and figure 3 (LongBench); section"
    " 5.3.1, figure 4 (needle in a haystack)",
    setting="Llama-3-8B and 70B, Mistral-7B, all Instruct; LongBench, 1,235 to 18,409 tokens on average, 64 to 256 and"
    " 2,048 keys per layer on average, windows of 8; needles in 8k tokens, 128 keys",
    how="SmolLM2-135M: pass keys in real prose at 512 tokens, asked for at the end of the prompt, an eighth kept, and"
    " a sixteenth; against full, random and SnapKV with the same window of 8; keys that hold nine tenths of"
    " the attention of the last 8 tokens, lower third of the layers over upper third. Scaled down in model and length.",
    tiers=("smoke", "cpu", "gpu"),
    counts="At an eighth within 5 points of full and 30 above random; at a sixteenth 5 points above SnapKV; 1.5 times"
    " as many keys hold nine tenths of the attention in the lower third of the layers.",
)
BUDGET, SMALL = 0.125, 0.0625
SAMPLES = 10
WINDOW = 8
MASS = 0.9


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(PyramidKV())
    bench = Bench("passkey", (512,), SAMPLES, progress, tier=tier)
    even = f"snapkv:window_tokens={WINDOW}"
    ours, small = bench.scores("pyramidkv", BUDGET), bench.scores("pyramidkv", SMALL)
    versus = {
        f"pyramidkv minus full, at {BUDGET}": (ours, bench.scores("full"), -0.05),
        f"pyramidkv minus random, at {BUDGET}": (ours, bench.scores("random:part=evict", BUDGET), 0.30),
        f"pyramidkv minus snapkv, at {SMALL}": (small, bench.scores(even, SMALL), 0.05),
    }
    checks = [at_least(name, bench.difference(a, b), bar) for name, (a, b, bar) in versus.items()]
    spread = [_spread(bench, sample) for sample in bench.samples[:5]]
    third = len(spread[0]) // 3
    ratio = mean_interval([sum(s[:third]) / sum(s[-third:]) for s in spread])
    checks.append(at_least("keys that hold 0.9 of the attention, lower third over upper", ratio, 1.5))
    where = ", ".join(f"{sum(s[i] for s in spread) / len(spread):.0f}" for i in range(0, len(spread[0]), 5))
    reason = f"Keys of nine tenths in every fifth layer: {where}."
    setting = f"{bench.where()}; {bench.what()}"
    return Evidence(checks, setting, reason, table=bench.rows())


@torch.no_grad()
def _spread(bench: Bench, sample: Any) -> list[float]:
    """Per layer: the fewest keys that hold nine tenths of the attention of a query of the window; mean over heads."""
    out = []
    for _, q, k, _ in Subject(bench.model).capture_qkv([sample.context]):
        q, k = q.float(), k.float()
        logits = q[0, :, -WINDOW:] @ k[0].repeat_interleave(q.shape[1] // k.shape[1], 0).mT * q.shape[-1] ** -0.5
        ahead = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(logits.shape[-1] - WINDOW + 1)
        weights = logits.masked_fill(ahead, -torch.inf).softmax(-1).sort(-1, descending=True).values
        out.append(float((weights.cumsum(-1) < MASS).sum(-1).add(1).double().mean()))
    return out
