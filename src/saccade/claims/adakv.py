"""Ada-KV: a budget that heads share keeps more of what is attended to than even parts do."""

from __future__ import annotations

from saccade.claims._bench import Bench, Progress, at_least, kept_mass, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.measure.contestants import parse
from saccade.measure.stats import mean_interval
from saccade.methods.cache.adakv import AdaKV

CLAIM = Claim(
    says="Sharing a layer's budget among its heads instead of dealing it out evenly keeps more attention weight, and"
    " makes SnapKV's answers better at every budget, most of all at small ones.",
    where="arXiv 2407.11550, abstract and section 3: 13 tasks of Ruler and 16 of LongBench, Ada-SnapKV against SnapKV,"
    " with the question known and unknown when the cache is cut",
    setting="Llama-3.1-8B and Mistral-7B; budgets from 20 to 80 percent, Ruler at 16k tokens, an A800 (unverified)",
    how="SmolLM2-135M, three key/value heads that share: pass keys in real prose at 512 tokens, asked for at the end"
    " of the prompt, an eighth kept, 16 voting tokens; against full, random and SnapKV with the same votes;"
    " share of the answer's attention to the prompt that falls on kept keys. Scaled down in model, heads and length.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Pass keys 5 points above SnapKV and 30 above random, within 10 of full; a hundredth more of the answer's"
    " attention on kept keys than SnapKV.",
)
BUDGET = 0.125
SAMPLES = 10
VOTES = "window_tokens=16"
OURS, THEIRS = f"adakv:{VOTES}", f"snapkv:{VOTES}"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(AdaKV(window_tokens=8))
    bench = Bench("passkey", (512,), SAMPLES, progress, tier=tier)
    ours = bench.scores(OURS, BUDGET)
    versus = {
        "adakv minus snapkv": (bench.scores(THEIRS, BUDGET), 0.05),
        "adakv minus random": (bench.scores("random:part=evict", BUDGET), 0.30),
        "adakv minus full": (bench.scores("full"), -0.10),
    }
    checks = [at_least(name, bench.difference(ours, theirs), bar) for name, (theirs, bar) in versus.items()]
    some = bench.samples[:5]
    kept, even = (kept_mass(bench.model, some, parse(spec).methods[0], BUDGET) for spec in (OURS, THEIRS))
    more = mean_interval([a - b for a, b in zip(kept, even)])
    checks.append(at_least("attention of the answer on kept keys, minus snapkv's", more, 0.01))
    reason = f"On kept keys {_mean(kept):.3f} of the answer's attention, with snapkv {_mean(even):.3f}."
    setting = f"{bench.where()}; {bench.what()}; {BUDGET} kept"
    return Evidence(checks, setting, reason, table=bench.rows())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
