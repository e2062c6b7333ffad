"""Expected Attention: what queries to come attend to can be told without seeing one."""

from __future__ import annotations

from saccade.claims._bench import Bench, Progress, at_least, at_most, kept_mass, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.measure.contestants import parse
from saccade.measure.stats import paired
from saccade.methods.cache.expected_attention import ExpectedAttention

CLAIM = Claim(
    says="Compressed before the question is known, half of the cache answers nearly as all of it, and better than what"
    " SnapKV, TOVA or KeyDiff keep; the keys kept are those that later tokens attend to.",
    where="arXiv 2510.00636, section 4.1: table 1 (Ruler, 4k and 16k), figure 2 (LongBench), figure 3 (needles, 125k)",
    setting="Llama-3.1-8B, Qwen3-8B, Gemma3-12B, instruction-tuned; epsilon 0.02 (needles: 0), heads of a layer share"
    " its budget; 8 H100",
    how="SmolLM2-135M: pass keys in 512 tokens, asked for after the compression, half kept; loss of 512 tokens"
    " after 512, half kept; against full, random, SnapKV and key norms; share of those tokens' attention to the prompt"
    " that falls on kept keys, a quarter kept. Scaled down in model and length.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Pass keys within 10 points of full, 10 above SnapKV and 30 above random; loss within 0.05 nats of full;"
    " more of the attention on kept keys than with SnapKV.",
)
HALF, QUARTER = 0.5, 0.25
KEYS, TEXTS = 10, 3
NAME = "expected-attention"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(ExpectedAttention())
    keys = Bench("passkey-agnostic", (512,), KEYS, progress, tier=tier)
    text = Bench("continuation-loss", (1024,), TEXTS, progress, (keys.model, keys.tokenizer), tier)
    ours = keys.scores(NAME, HALF)
    versus = {
        "expected-attention minus full, pass keys": (keys.scores("full"), -0.10),
        "expected-attention minus snapkv, pass keys": (keys.scores("snapkv", HALF), 0.10),
        "expected-attention minus random, pass keys": (keys.scores("random:part=evict", HALF), 0.30),
    }
    checks = [at_least(name, keys.difference(ours, theirs), bar) for name, (theirs, bar) in versus.items()]
    keys.scores("knorm", HALF)
    loss = text.difference(text.scores(NAME, HALF), text.scores("full"))
    for spec in ("snapkv", "random:part=evict"):
        text.scores(spec, HALF)
    checks.append(at_most("expected-attention minus full, nats", loss, 0.05))
    mine, snap = (kept_mass(text.model, text.samples, parse(s).methods[0], QUARTER) for s in (NAME, "snapkv"))
    checks.append(at_least("attention of later tokens on kept keys, minus snapkv's", paired(mine, snap, False), 0.0))
    mean = text.difference(text.scores(f"{NAME}:covariance=false", HALF), text.scores(NAME, HALF))
    reason = (
        f"On kept keys {sum(mine) / len(mine):.3f} of the attention of later tokens, with snapkv"
        f" {sum(snap) / len(snap):.3f}. Without the covariance {mean.mean:+.3f} nats."
    )
    setting = f"{keys.where()}; {keys.what()}, {text.what()}"
    return Evidence(checks, setting, reason, table=keys.rows() + text.rows())
