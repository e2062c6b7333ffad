"""ZipVL: how many tokens matter differs by layer; a prompt read among them, and 4 and 2 bits, lose little."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade import models
from saccade.attach import attach
from saccade.attach.calibration import Subject
from saccade.attach.compat import CACHE
from saccade.claims._bench import Bench, Progress, at_least, at_most, captured, logits, machinery
from saccade.claims._contract import SEED, Check, Claim, Evidence
from saccade.core import rng
from saccade.measure.bytes import cache_bytes, full_cache_bytes
from saccade.measure.stats import mean_interval
from saccade.methods.cache.zipvl import ZipVL

CLAIM = Claim(
    says="About half of the tokens, another number in every layer, hold 97.5 % of the attention; a prompt read among"
    " them alone, and a cache of 4 bits for them and 2 for the rest, lose next to nothing, less than with the same"
    " number everywhere. 128 probe rows tell what all rows would.",
    where="arXiv 2410.08584, first version: section 4, and the tables of LLaVA-v1.5, LLaVA-Next and LongVA (VQAv2,"
    " ChartQA, TextVQA, GQA, MME, Video-MME), GSM8K by the cache alone",
    setting="LLaVA-v1.5-7B, LLaVA-Next-7B and 13B, LongVA-7B with images and video, LLaMA3-8B with text; prompts up to"
    " 128,000 tokens; prefill 2.6 times as fast, half of the memory",
    how="SmolLM2-135M on text, since no trained model with images is at hand, computing in float32, on a GPU in"
    " bfloat16. Loss on 512 tokens"
    " of prose after 1,536 that were read and packed, with the whole method, and with a dense prompt, which leaves the"
    " cache; the latter also with the same number of tokens in 4 bits in every layer, and with 2 bits alone; ten pass"
    " keys in 1,024 tokens, asked for after packing. Full, random keys, and sinks and window, the last two in as many"
    " bytes. Tokens that matter, by 128 rows and by all. Bytes of a cache of 1,536 tokens in bfloat16. Smaller,"
    " shorter and blind: scaled down; its speed is not measured.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Loss within 5 % perplexity of full with the whole method and 2 % by the cache alone; the same number"
    " everywhere, and 2 bits alone, lose more than that cache; pass keys within 5 points; at most three fifths of the"
    " tokens matter, with a deviation of a tenth over layers; by 128 rows as many as by all, within 5 points; the cache"
    " in 16-bit numbers at most three tenths.",
)
OURS, CACHE_ALONE = ZipVL(), ZipVL(prompt="dense")
EVEN = ZipVL(prompt="dense", mass_share=1.0)  # as many as the budget says
ALL_ROWS = ZipVL(recent_probe_tokens=10**6)
BASELINES = ("random:part=evict", "streaming")


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return _smoke()
    text = Bench("continuation-loss", (2048,), 3, progress, tier=tier)
    keys = Bench("passkey-agnostic", (1024,), 10, progress, (text.model, text.tokenizer), tier)
    contexts = [sample.context for sample in text.samples]
    few, all_rows = (_matter(text.model, contexts, method) for method in (OURS, ALL_ROWS))
    ratio = float(few.mean())
    ours, full, alone = (text.scores(x) for x in (OURS, "full", CACHE_ALONE))
    even, two = text.scores(EVEN, ratio), text.scores(EVEN, "1tok", "2 bits")
    found, all_found = keys.scores(OURS), keys.scores("full")
    shares = {bench: _share(text.model, bench.samples[0].context) for bench in (text, keys)}
    for bench, share in shares.items():
        for baseline in BASELINES:
            bench.scores(baseline, share)
    half = _share(copy.deepcopy(text.model).to(torch.bfloat16), contexts[0])
    spread = float(few.mean(0).std())
    checks = [
        at_most("whole method minus full, nats (5 %)", text.difference(ours, full), 0.05),
        at_most("cache alone minus full, nats (2 %)", text.difference(alone, full), 0.02),
        at_least("as many everywhere minus cache alone, nats", text.difference(even, alone), 0.0),
        at_least("2 bits minus cache alone, nats", text.difference(two, alone), 0.0),
        at_least("whole method minus full, pass keys", keys.difference(found, all_found), -0.05),
        at_most("share of tokens that matter", mean_interval(few.mean(1).tolist()), 0.6),
        Check("its deviation over layers", spread, spread, spread, 0.1, spread >= 0.1),
        at_most("128 rows against all, share", mean_interval((few - all_rows).abs().mean(1).tolist()), 0.05),
        Check(f"bytes of {contexts[0].shape[1]:,} tokens in bfloat16 over full", half, half, half, 0.3, half <= 0.3),
    ]
    setting = (
        f"{text.where()}; {text.what()}, 512 of them scored, {keys.what()}; random and streaming keep"
        f" {shares[text]:.3f} and {shares[keys]:.3f} of the keys, the bytes of ours in {text.tier.dtype}"
    )
    lost = text.difference(text.scores(BASELINES[1], shares[text]), full).mean
    reason = (
        f"Sinks and window in as many bytes lose {lost:+.3f} nats. Of the tokens, {few.mean(0).min():.2f} to"
        f" {few.mean(0).max():.2f} matter, by layer; {ratio:.2f} in the mean."
    )
    return Evidence(checks, setting, reason, table=text.rows() + keys.rows() + _by_layer(few, all_rows))


@torch.no_grad()
def _matter(model: Any, texts: Sequence[Tensor], method: ZipVL) -> Tensor:
    """[texts layers]: the share of tokens that matter when a prompt is read densely."""
    subject = Subject(model)
    marks = [float(method.mark(q, k, dataclasses.replace(site, seed=SEED)).double().mean())
             for site, q, k, _ in captured(subject, texts, 1.0)]  # fmt: skip
    return torch.tensor(marks).view(len(texts), subject.layers)


def _by_layer(few: Tensor, all_rows: Tensor) -> list[dict[str, Any]]:
    shares = zip(few.mean(0).tolist(), all_rows.mean(0).tolist())
    return [{"layer": i, "share by 128 rows": a, "share by all rows": b} for i, (a, b) in enumerate(shares)]


@torch.no_grad()
def _share(model: Any, context: Tensor) -> float:
    """Bytes that the method takes of the model's own cache, when this text has been read."""
    whole = full_cache_bytes(model, context.shape[1])
    with attach(model, OURS, seed=SEED):
        return cache_bytes(model(context.to(model.device), use_cache=True, logits_to_keep=1)[CACHE]) / whole


@torch.no_grad()
def _smoke() -> Evidence:
    """On a tiny random model: if all tokens matter and none is packed nothing changes; what is packed takes less."""
    evidence = machinery(ZipVL(unimportant="drop", mass_share=1.0))
    model = models.tiny("llama").double()
    ids = torch.randint(3, models.families.VOCAB, (1, 96), generator=rng.generator("smoke"))
    with attach(model, ZipVL(unit_tokens=8), seed=SEED) as run:
        logits(model, ids)
        held = run.record.bytes_held
    share = held / full_cache_bytes(model, ids.shape[1])
    small = Check("4 and 2 bits: bytes over full", share, share, share, 0.3, share <= 0.3)
    return dataclasses.replace(evidence, checks=[*evidence.checks, small])
