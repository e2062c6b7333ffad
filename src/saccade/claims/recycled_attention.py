"""Recycled Attention: the keys of a full step serve the steps after it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from saccade import ops
from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Captured, Progress, Spec, at_least, at_most, captured, machinery
from saccade.claims._contract import SEED, Claim, Evidence
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.selection import Selection, dense
from saccade.core.site import Seen, Site
from saccade.measure import score
from saccade.measure.contestants import parse
from saccade.measure.stats import mean_interval, paired
from saccade.methods.cache.streaming import Streaming
from saccade.methods.decode.recycled_attention import RecycledAttention
from saccade.methods.sparse.oracle_topk import OracleTopk
from saccade.methods.sparse.random import Random
from saccade.tasks._base import Sample
from saccade.tasks._needles import DEPTHS, Riddle, hide
from saccade.tasks.word_aggregation import WORDS

CLAIM = Claim(
    says="The keys that a full step attends to most serve the steps after it: with an eighth of 16k keys and each tenth"
    " step full, perplexity stays near full attention and below sinks and window; they hold over 90 % of the"
    " attention mass; fewer full steps lose more; a schedule by query similarity is not worse than a fixed one.",
    where="arXiv 2411.05787, sections 4 and 5: language modelling at 16k (Arxiv and Book perplexity), recovered mass of"
    " attention, RULER",
    setting="Llama-3.1-8B and Qwen2-7B, K = 2048 of 16k, S = 10; K = 4096 of 32k and 64k, S = 50; one A100",
    how="SmolLM2-135M, K an eighth of the keys. Loss on 512 tokens of prose after a context of 1,536: a full step every"
    " 10 or 50 tokens, or never, and the dynamic schedule on the budget of the first; against full attention, random"
    " keys, sinks and window (which the context is read under, too) and an exact search at every step, each reading"
    " as many keys as S = 10, full steps included. The attention mass of the recycled keys in cheap steps, 128"
    " queries after 896 tokens. Twenty-four random words, hidden in 1,024 tokens and asked for, said again token by"
    " token, against sinks and window. H2O, which the paper compares with, is not in this library. Shorter and"
    " smaller than the paper: scaled down.",
    tiers=("smoke", "cpu", "gpu"),
    counts="S = 10 within the paper's 0.061 nats of full (perplexity 2.36 against 2.22) and not above sinks and window;"
    " S = 50 not below S = 10, never not below S = 50; the dynamic schedule not above the fixed one by more than 0.01"
    " nats; 85 % of the attention mass, and 10 points more than sinks and window; twice their recited tokens.",
)
KEPT = 1 / 8  # K over the keys
OFTEN, SELDOM, NEVER = 10, 50, 10**6
NEAR = math.log(2.36 / 2.22)
SPOKEN = 24  # words of a recital
RECITALS, LENGTH = 8, 1024  # samples, tokens of each
QUERIES = 128  # last of a text, that mass is measured on


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(RecycledAttention(every_tokens=6))
    text = Bench("continuation-loss", (2048,), 3, progress, tier=tier)
    often, budget = text.scores(ours(OFTEN), share(OFTEN)), share(OFTEN)
    seldom, never = text.scores(ours(SELDOM), share(SELDOM)), text.scores(ours(NEVER), share(NEVER))
    turning = text.scores(f"{ours(OFTEN)},schedule=dynamic", budget)
    full, near = text.scores("full"), text.scores("streaming", budget)
    exact = text.scores("double-sparsity:channels=64,dense_layers=0", budget)
    text.scores("random:part=decode", budget)
    masses = _masses(Subject(text.model), [s.context[:, :1024] for s in text.samples[-2:]])
    words = {who: _recited(text, who, budget) for who in ("full", ours(OFTEN), "streaming", "random:part=decode")}
    more = [a - 2 * b for a, b in zip(words[ours(OFTEN)], words["streaming"])]
    checks = [
        at_most("S = 10 minus full, nats (the paper's)", text.difference(often, full), NEAR),
        at_least("sinks and window of as many reads minus S = 10, nats", text.difference(near, often), 0.0),
        at_least("S = 50 minus S = 10, nats", text.difference(seldom, often), 0.0),
        at_least("no full step minus S = 50, nats", text.difference(never, seldom), 0.0),
        at_most("dynamic minus S = 10, nats", text.difference(turning, often), 0.01),
        at_least("attention mass in cheap steps, S = 10", mean_interval(masses["S = 10"]), 0.85),
        at_least("the same minus sinks and window", paired(masses["S = 10"], masses["streaming"], False), 0.10),
        at_least("recited tokens minus twice those of sinks and window", mean_interval(more), 0.0),
    ]
    table = [{"who": who, "attention mass": sum(m) / len(m), "n": len(m)} for who, m in masses.items()]
    table += [{"who": who, "recited": sum(w) / len(w), "n": len(w)} for who, w in words.items()]
    lost, best = text.difference(exact, full).mean, sum(masses["oracle-topk"]) / len(masses["oracle-topk"])
    reason = (
        f"An exact search at every step, as many reads, loses {lost:+.3f} nats, and the exact best K keys hold"
        f" {best:.3f} of the mass. Of the words, full attention itself recites {sum(words['full']) / RECITALS:.2f}."
    )
    setting = (
        f"{text.where()}; K = 1/8; {text.what()}, the last 512 scored; at every tier mass on 2 texts of 1,024 tokens,"
        f" 30 layers, and {RECITALS} recitals of {SPOKEN} words in {LENGTH:,} tokens"
    )
    return Evidence(checks, setting, reason, table=text.rows() + table)


def ours(every: int) -> str:
    """The method with a full step at every so many tokens."""
    return f"recycled-attention:every_tokens={every}"


def share(every: int) -> float:
    """Of the keys, what full and cheap steps read together: (1 + (S - 1) K) / S."""
    return (1 + (every - 1) * KEPT) / every


# --- attention mass ---------------------------------------------------------------------------------------------------


def _masses(subject: Subject, texts: list[Tensor]) -> dict[str, list[float]]:
    """Per text and layer: the share of full attention that falls on the keys read in cheap steps, K of each query.

    The others read K keys too: the budget of a step without full ones.
    """
    out: dict[str, list[float]] = {}
    for where, *qkv in captured(subject, texts, KEPT):
        found = where, *(x.float() for x in qkv)
        for every in (OFTEN, SELDOM, NEVER):
            out.setdefault(f"S = {every}" if every < NEVER else "never", []).append(_recycled(found, every))
        site, q, k, v = _decoding(found, KEPT)
        for method in (Streaming(), OracleTopk(), Random(part="decode")):
            chosen = method.select(q, k, site)
            out.setdefault(method.card.name, []).append(_mass(q, k, v, chosen, site, slice(None)))
    return out


def _decoding(found: Captured, budget: float) -> Captured:
    """The last queries of a text, as if they came after a prompt."""
    site, q, k, v = found
    return dataclasses.replace(site, stage="decode", queries=QUERIES, budget=Budget(budget)), q[:, :, -QUERIES:], k, v


def _recycled(found: Captured, every: int) -> float:
    """Of our method; its full steps, which miss nothing, are left out."""
    method = RecycledAttention(every_tokens=every)
    site, q, k, v = _decoding(found, share(every))
    positions = torch.arange(site.keys, dtype=torch.int32, device=k.device).expand(*k.shape[:2], -1)
    prompt = site.offset
    start = dataclasses.replace(site, stage="prefill", queries=0, keys=prompt, seen=prompt, state={})
    seen = Seen(k[:, :, :prompt], v[:, :, :prompt], positions[..., :prompt], found[1][:, :, prompt - 1 : prompt])
    method.begin(seen, start)
    here = dataclasses.replace(site, state=start.state)
    chosen = method.select(q, {"keys": k, "values": v, "positions": positions}, here)
    cheap = [i for i in range(QUERIES) if (i + 1) % every]
    return _mass(q, k, v, chosen, site, cheap)


def _mass(q: Tensor, k: Tensor, v: Tensor, selection: Selection, site: Site, rows: slice | list[int]) -> float:
    part, whole = (ops.attend(q, k, v, s, scale=site.scale)[1] for s in (selection, dense(site.queries, site.keys)))
    return float(torch.exp((part - whole).double())[:, :, rows].mean())


# --- recital ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _recited(text: Bench, spec: Spec, budget: float) -> list[float]:
    """Per sample: the share of the answer's tokens that are the likeliest, each after the true ones before it."""
    subject, who = score.Subject(text.model, text.tokenizer), parse(spec).equipped(text.mark)
    with who.working(text.model, Budget(budget), SEED) as run:
        samples = [_recital(text.tokenizer, i) for i in range(RECITALS)]
        said = [score.forward(subject, [sample], run).logits[0, sample.scored].argmax(-1).cpu() for sample in samples]
    return [float((a == s.continuation[0, s.scored]).float().mean()) for a, s in zip(said, samples)]


def _recital(tokenizer: object, index: int) -> Sample:
    """Words drawn at random, hidden in prose, and the question for them."""
    random = rng.python("claims/recycled-attention", SEED, index)
    words = " ".join(random.sample(WORDS, SPOKEN))
    riddle = Riddle(
        intro="A list of words is hidden in the text below. Remember it.\n\n",
        needles=((DEPTHS[index % len(DEPTHS)], f" The list of words is: {words}. Remember it."),),
        steps=(("\n\nWhat is the list of words? The list of words is:", f" {words}"),),
    )
    return hide(tokenizer, riddle, LENGTH, index, SEED, True, "recital")
