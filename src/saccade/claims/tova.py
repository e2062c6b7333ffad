"""TOVA: a cache that forgets what the newest token attends to least is nearly as good as an unbounded one."""

from __future__ import annotations

from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.methods.cache.tova import TOVA

CLAIM = Claim(
    says="An eighth of the cache, kept by the weights of the last token, is nearly on par with all of it in language"
    " modelling, and better than windows, sinks with a window and H2O of the same size; questions that are answered by"
    " single passages of a long text take half.",
    where="arXiv 2401.06104, section 6.1, figure 3 (PG-19: within 0.4 perplexity of full at an eighth); section 6.2,"
    " figure 5 (QASPER)",
    setting="Llama-2-7B, Mistral-7B, Yi-7B; chunks of 4,096 tokens, caches of 64 to 4,096; QASPER: chat models",
    how="SmolLM2-135M: loss of the last 512 of 1,024 tokens with a cache of 128 keys throughout, against full, a"
    " window, sinks with a window and H2O of the same size, and random keys of the prompt with all later ones, which"
    " hold more; pass keys in 512 tokens, an eighth kept. Scaled down in model and length.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Loss within 0.06 nats of full (0.4 of the paper's perplexity of about 7), 0.05 below the window, below"
    " sinks with a window and below H2O; pass keys 30 points above random.",
)
SHARE = 0.125  # of the keys of a text, or of a prompt
TEXTS, KEYS = 3, 10
WINDOW = "streaming:sink_tokens=0"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(TOVA())
    text = Bench("continuation-loss", (1024,), TEXTS, progress, tier=tier)
    keys = Bench("passkey", (512,), KEYS, progress, (text.model, text.tokenizer), tier)
    held = f"{int(SHARE * text.lengths[0])}tok"
    ours, full = text.scores("tova", held), text.scores("full")
    text.scores("random:part=evict", held)
    window, sinks, h2o = (text.scores(spec, held) for spec in (WINDOW, "streaming", "h2o"))
    found, chance = keys.scores("tova", SHARE), keys.scores("random:part=evict", SHARE)
    checks = [
        at_most("tova minus full, nats", text.difference(ours, full), 0.06),
        at_most("tova minus a window, nats", text.difference(ours, window), -0.05),
        at_most("tova minus sinks with a window, nats", text.difference(ours, sinks), 0.0),
        at_most("tova minus h2o, nats", text.difference(ours, h2o), 0.0),
        at_least("tova minus random, pass keys", keys.difference(found, chance), 0.30),
    ]
    lost = keys.difference(found, keys.scores("full")).mean
    reason = f"Minus full, {lost:+.2f} pass keys: at an eighth of the prompt, cut by the weights of one token."
    setting = f"{text.where()}; {text.what()}, {keys.what()}; caches of {held}"
    return Evidence(checks, setting, reason, table=text.rows() + keys.rows())
