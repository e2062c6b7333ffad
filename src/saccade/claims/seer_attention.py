"""SeerAttention: gates that were trained once pick the blocks of a prefill, at whatever density is asked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from saccade.attach.calibration import Subject
from saccade.attach.distil import first_gates
from saccade.claims._bench import TIERS, Bench, Progress, at_least, at_most, captured, ceiling, machinery, mass
from saccade.claims._contract import SEED, Claim, Evidence
from saccade.core.artefact import Artefact
from saccade.core.errors import CannotRun
from saccade.core.method import Method
from saccade.measure.stats import Estimate, mean_interval
from saccade.methods.sparse.minference import CANDIDATES, MInference
from saccade.methods.sparse.random import Random
from saccade.methods.sparse.seer_attention import SeerAttention, stored
from saccade.tasks import passage

CLAIM = Claim(
    says="Gates trained once serve every density: perplexity on PG19 at 8k goes from 10.03 (dense) to 10.04 at half of"
    " the pairs, 10.19 at a fifth and 10.61 at a tenth, less at longer texts; better than fixed or searched shapes.",
    where="arXiv 2410.13276, section 5; microsoft/SeerAttention, table of its README",
    setting="an 8B Llama, 8k to 128k tokens; gates trained for 500 steps of 16 texts of 64k tokens on 8 GPUs",
    how="SmolLM2-135M with the shipped gates and blocks of 16 tokens, as large a share of the text as the paper's 64 at"
    " 8k: loss on the last 512 of 2,048 tokens of real prose that gates were not trained on, at a half, a quarter and a"
    " tenth of the causal pairs; against full, random blocks, blocks by pooled means, the same gates before training,"
    " and sinks with a window, at a quarter. 4 to 64 times shorter than the paper, where attention is less sparse, with"
    " far less than a thousandth of its training: scaled down. Speed is measured elsewhere.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Perplexity within 3 % of full at a quarter and 10 % at a tenth; at a quarter better than random blocks by"
    " 2 %, and no worse than pooled means or sinks and window; 85 % of the attention mass kept at a tenth.",
)
TOKENS, COUNT, BLOCK = 2048, 3, 16


def measured_places(tokenizer: Any) -> list[tuple[int, int]]:
    """Which tokens of the shipped text are measured: gates are not to be trained on them."""
    starts = [passage(tokenizer, TOKENS, i, SEED)[1] for i in range(COUNT)]
    return [(start, start + TOKENS) for start in starts]


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu", which reads the texts of "cpu": gates were trained on all others."""
    if tier == "smoke":
        keys = torch.linspace(-1, 1, 2 * 4 * 48 * 16).view(2, 4, 48, 16)
        return machinery(SeerAttention(artefact=Artefact("seer-attention", stored({"keys": keys}), "tiny", "")))
    longer, more = TIERS[tier].longer, TIERS[tier].more
    text = Bench("loss", (TOKENS // longer,), COUNT // more, progress, tier=tier)
    made = Artefact.find("seer-attention", text.mark)
    if made is None:
        raise CannotRun("claim seer-attention", "no gates were trained for SmolLM2", "saccade calibrate seer-attention")
    seer = SeerAttention(artefact=made, block_tokens=BLOCK)
    full, ours = text.scores("full"), {b: text.scores(seer, b, "seer-attention") for b in (0.5, 0.25, 0.1)}
    theirs = {name: text.scores(method, 0.25, name) for name, method in _others(made).items()}
    kept = _kept_mass(text, seer, 0.1)
    checks = [
        at_most("a quarter minus full, nats (3 %)", text.difference(ours[0.25], full), math.log(1.03)),
        at_most("a tenth minus full, nats (10 %)", text.difference(ours[0.1], full), math.log(1.10)),
        at_least("random blocks minus ours, nats (2 %)", text.difference(theirs["random"], ours[0.25]), 0.02),
        at_least("pooled means minus ours, nats", text.difference(theirs["pooled means"], ours[0.25]), 0.0),
        at_least("sinks and window minus ours, nats", text.difference(theirs["sinks and window"], ours[0.25]), 0.0),
        at_least("attention mass kept at a tenth", kept, 0.85),
    ]
    trained = f"gates trained on blocks of {made.options['block_tokens']} of {made.data}"
    setting = f"{text.where()}; {text.what()}, the same texts at every tier; {trained}"
    gained = text.difference(theirs["untrained gates"], ours[0.25]).mean
    reason = f"{ceiling(text, 0.25, math.log(1.03))} Training the gates is worth {gained:+.3f} nats at a quarter."
    return Evidence(checks, setting, reason, table=[*text.rows(), dict(made.figures)])


def _others(made: Artefact) -> dict[str, Method]:
    """What else could choose a quarter of the pairs."""
    keys = made.tensors["keys"]
    heads = made.tensors.get("queries", keys).shape[1]
    parts = keys.shape[-1] // (keys.shape[-2] // 3) if "queries" in made.tensors else 0
    like = {"queries": keys.new_empty(len(keys), heads, 0, keys.shape[-2] // 3), "keys": keys}
    first = dataclasses.replace(made, tensors=stored(first_gates(SeerAttention(train_parts=parts), like)))
    blocks, ends = (_all(shape, len(keys), heads, made.fingerprint) for shape in ("blocks", "spans"))
    return {
        "random": Random(part="prefill", block_tokens=BLOCK),
        "untrained gates": SeerAttention(artefact=first, block_tokens=BLOCK),
        "pooled means": MInference(artefact=blocks, block_tokens=BLOCK, force_diagonal=True),
        "sinks and window": MInference(artefact=ends),
    }


def _all(shape: str, layers: int, heads: int, mark: str) -> Artefact:
    """Every head of the same shape."""
    number = next(i for i, c in enumerate(CANDIDATES) if c.shape == shape)
    figures = {"candidates": [list(c) for c in CANDIDATES]}
    return Artefact("minference", {"pattern": torch.full((layers, heads), number)}, "", mark, figures=figures)


def _kept_mass(text: Bench, ours: SeerAttention, budget: float) -> Estimate:
    """Attention mass of the chosen pairs, in each layer of one passage."""
    layers = captured(Subject(text.model), [text.samples[-1].context], budget)
    return mean_interval([mass(q, k, v, ours.select(q, k, site), site) for site, q, k, v in layers])
