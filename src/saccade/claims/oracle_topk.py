"""Oracle top-k: few keys carry the attention."""

from __future__ import annotations

from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.methods.sparse.oracle_topk import OracleTopk

CLAIM = Claim(
    says="Attention is sparse: the tenth of the keys that a query attends to most is nearly as good as all of them, so"
    " there is something for selection to find.",
    where="our own statement, the premise of every sparse method here; cf. arXiv 2407.02490, figure 2",
    setting="any language model and long text",
    how="Loss on the last 512 of 1,024 and 2,048 tokens of real prose and pass keys at 1,024, SmolLM2-135M, exact top-k"
    " in prefill and decoding at a tenth of the pairs, against full and random blocks at the same density.",
    counts="Loss within 0.02 nats of full, pass keys within 5 points; random blocks 0.1 nats worse.",
)
BUDGET = 0.1


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke" or "cpu"."""
    if tier == "smoke":
        return machinery(OracleTopk())
    text = Bench("loss", (1024, 2048), 3, progress)
    keys = Bench("passkey", (1024,), 6, progress, (text.model, text.tokenizer))
    ours, chance = "oracle-topk", "random:part=prefill"
    loss = text.difference(text.scores(ours, BUDGET), text.scores("full"))
    worse = text.difference(text.scores(chance, BUDGET), text.scores(ours, BUDGET))
    kept = keys.difference(keys.scores(ours, BUDGET), keys.scores("full"))
    checks = [
        at_most("nats, oracle minus full", loss, 0.02),
        at_least("nats, random blocks minus oracle", worse, 0.1),
        at_least("pass keys, oracle minus full", kept, -0.05),
    ]
    keys.scores(chance, BUDGET)
    setting = f"SmolLM2-135M-Instruct, float32; {BUDGET} of the causal pairs in every layer"
    return Evidence(checks, setting, table=text.rows() + keys.rows())
