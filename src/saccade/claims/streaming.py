"""Attention sinks: a window alone collapses, with the first tokens it does not."""

from __future__ import annotations

from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.methods.cache.streaming import Streaming

CLAIM = Claim(
    says="Window attention collapses once the first tokens leave the window; four of them kept restore the"
    " perplexity. What lies between is gone.",
    where="arXiv 2309.17453, section 3.1 and 3.2, table 1 and figure 3",
    setting="Llama-2-13B, PG19, 65k tokens, cache of 1,024",
    how="Loss on the last 512 tokens of real prose, SmolLM2-135M, 1,536 tokens, a cache of 256: window alone,"
    " with four sinks, with everything, and random keys; pass keys outside the window.",
    counts="Four sinks within 0.15 nats of everything, the window alone at least 0.5 nats worse than with sinks, and"
    " pass keys lost: 50 points or more below the full cache.",
)
HELD = "256tok"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke" or "cpu"."""
    if tier == "smoke":
        return machinery(Streaming())
    text = Bench("loss", (1536,), 6, progress)
    full, ours = text.scores("full"), text.scores("streaming", HELD)
    alone = text.scores("streaming:sink_tokens=0", HELD)
    text.scores("random:part=prefill", 256 / 1536)
    keys = Bench("passkey", (512,), 10, progress, (text.model, text.tokenizer))
    lost = keys.difference(keys.scores("streaming", "128tok"), keys.scores("full"))
    keys.scores("random:part=evict", 0.25)
    checks = [
        at_most("sinks minus everything, nats", text.difference(ours, full), 0.15),
        at_least("window alone minus sinks, nats", text.difference(alone, ours), 0.5),
        at_most("streaming minus full, pass keys", lost, -0.5),
    ]
    setting = f"SmolLM2-135M-Instruct, float32; 6 texts of 1,536 tokens, {HELD}; 10 pass keys in 512 tokens, 128tok"
    return Evidence(checks, setting, table=text.rows() + keys.rows())
