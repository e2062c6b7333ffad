"""Random selection: a budget spent blindly is worth little."""

from __future__ import annotations

from saccade.claims._bench import Bench, Progress, at_least, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.methods.sparse.random import Random

CLAIM = Claim(
    says="Which keys are kept matters: a random quarter of them loses the pass key and raises the loss, in the prefill,"
    " in the cache and in decoding.",
    where="our own statement: what makes it a baseline",
    setting="any model and task on which selection is to be shown to matter",
    how="Pass keys in real prose and the loss of 512 tokens, SmolLM2-135M at 1,024 tokens, a quarter of the keys"
    " evicted, computed or read at random, against full.",
    counts="Each part loses at least 30 points of pass keys, and the loss rises by 0.05 nats or more.",
)
BUDGET = 0.25


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke" or "cpu"."""
    if tier == "smoke":
        return machinery(Random(part="decode"))
    keys = Bench("passkey", (1024,), 8, progress)
    text = Bench("continuation-loss", (1024,), 4, progress, (keys.model, keys.tokenizer))
    checks = []
    for part in ("evict", "decode", "prefill"):
        lost = keys.difference(keys.scores("full"), keys.scores(f"random:part={part}", BUDGET))
        checks.append(at_least(f"pass keys, full minus random {part}", lost, 0.30))
    for part in ("evict", "decode"):
        more = text.difference(text.scores(f"random:part={part}", BUDGET), text.scores("full"))
        checks.append(at_least(f"nats, random {part} minus full", more, 0.05))
    setting = f"SmolLM2-135M-Instruct, float32, 1,024 tokens; {BUDGET} of the keys or pairs"
    return Evidence(checks, setting, table=keys.rows() + text.rows())
