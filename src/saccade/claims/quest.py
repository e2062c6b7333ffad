"""Quest: the bounds of pages point out the keys that a query needs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, captured, machinery, mass
from saccade.claims._contract import Claim, Evidence
from saccade.core.budget import Budget
from saccade.measure.stats import mean_interval
from saccade.methods.decode.quest import Quest
from saccade.methods.sparse.oracle_topk import OracleTopk
from saccade.methods.sparse.random import Random

CLAIM = Claim(
    says="Pages of 16 keys, chosen by their bounds for every query, hold what it needs: with an eighth of 32k keys the"
    " perplexity is that of full attention, and pass keys are found with a hundredth of the keys, where caches that"
    " drop keys before the question lose them.",
    where="arXiv 2406.10774, sections 4.1 and 4.2: perplexity on PG19, table of pass keys in 10k and 100k tokens",
    setting="LongChat-7B and Yarn-Llama-2-7B, pages of 16, layers 0 and 1 dense; 64 of 10k keys find 99 % of the pass"
    " keys, 1,024 of 100k 96 %; RTX 4090 and Ada 6000",
    how="SmolLM2-135M, pages of 16. Loss on 512 tokens of prose after a context of 1,536 with an eighth of the keys;"
    " ten pass keys in 1,024 tokens, question and answer read with a sixteenth of the keys (64, as many as in the"
    " paper's table); layers 0 and 1 dense, which the budget pays for. Full, random keys, and sinks and window at the"
    " same budget; pages of 1 key, an exact search, and pages for every query head. The attention mass of the keys"
    " read against that of as many exact best keys, 64 queries after 960 tokens, an eighth of the keys. Shorter and"
    " smaller than the paper: scaled down; its speed is not measured.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Loss within 3 % perplexity of full, and not above sinks and window; pass keys within 5 points of full and"
    " 30 above sinks and window; nine tenths of the attention mass of the exact best keys.",
)
# what layers 0 and 1 read is part of the budget: an eighth and a sixteenth of the keys in the other 28 of 30 layers
EIGHTH, SIXTEENTH = (2 + 28 / 8) / 30, (2 + 28 / 16) / 30
BAR = 0.03  # nats
EXACT, APART = "quest:page_tokens=1", "quest:group=per-head"
BASELINES = ("random:part=decode", "streaming")
SIZES = {1: EXACT, 4: "quest:page_tokens=4", 16: "quest"}
QUERIES = 64  # last of a text, that mass is measured on


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(Quest(page_tokens=4, dense_layers=0))
    text = Bench("continuation-loss", (2048,), 3, progress, tier=tier)
    losses = {who: text.scores(who, EIGHTH) for who in ("quest", EXACT, APART, *BASELINES)}
    losses["full"] = text.scores("full")
    keys = Bench("passkey-agnostic", (1024,), 10, progress, (text.model, text.tokenizer), tier)
    hits = {who: keys.scores(who, SIXTEENTH) for who in ("quest", EXACT, APART, *BASELINES)}
    hits["full"] = keys.scores("full")
    masses = _masses(Subject(text.model), [s.context[:, :1024] for s in text.samples[:2]])
    share = mean_interval([a / b for a, b in zip(masses["quest"], masses["oracle-topk"])])
    lost = {who: text.difference(values, losses["full"]) for who, values in losses.items()}
    checks = [
        at_most("an eighth of the keys minus full, nats (3 %)", lost["quest"], BAR),
        at_least("sinks and window minus quest, nats", text.difference(losses["streaming"], losses["quest"]), 0.0),
        at_least("a sixteenth, pass keys, minus full", keys.difference(hits["quest"], hits["full"]), -0.05),
        at_least("and minus sinks and window", keys.difference(hits["quest"], hits["streaming"]), 0.30),
        at_least("attention mass over that of the exact best keys", share, 0.9),
    ]
    shown = [{"who": who, "attention mass": sum(v) / len(v), "n": len(v)} for who, v in masses.items()]
    by_size = ", ".join(f"{sum(masses[who]) / len(masses[who]):.2f} of {size}" for size, who in SIZES.items())
    reason = (
        f"Pages of one key, an exact search, lose {lost[EXACT].mean:+.3f} nats and find {sum(hits[EXACT]):.0f} of"
        f" {len(hits[EXACT])} pass keys; attention mass by the keys of a page: {by_size}. An eighth of 1,024 keys are 8"
        " pages, of 32k they are 256. With pages for every query head it is"
        f" {lost[APART].mean:+.3f} nats and {sum(hits[APART]):.0f} pass keys."
    )
    setting = (
        f"{text.where()}; {text.what()}, 512 of them scored, {keys.what()}; at every tier mass of the last"
        f" {QUERIES} queries of 2 texts of 1,024 tokens"
    )
    return Evidence(checks, setting, reason, table=text.rows() + keys.rows() + shown)


def _masses(subject: Subject, texts: list[Tensor]) -> dict[str, list[float]]:
    """Per text and layer: the share of full attention that falls on the keys read, an eighth of each query's."""
    out: dict[str, list[float]] = {}
    for found, q, k, v in captured(subject, texts, 1 / 8):
        site = dataclasses.replace(found, stage="decode", queries=QUERIES, budget=Budget(1 / 8))
        q, k, v = q.float(), k.float(), v.float()
        last, places = q[:, :, -QUERIES:], torch.arange(site.keys, device=k.device).expand(*k.shape[:2], -1)
        stored = {"keys": k, "values": v, "positions": places}
        pages = {who: Quest(page_tokens=size, dense_layers=0) for size, who in SIZES.items()}
        chosen = {who: m.select(last, stored, dataclasses.replace(site, state={})) for who, m in pages.items()}
        chosen |= {m.card.name: m.select(last, k, site) for m in (OracleTopk(), Random(part="decode"))}
        for who, selection in chosen.items():
            out.setdefault(who, []).append(mass(last, k, v, selection, site))
    return out
