"""XAttention: sums along antidiagonals find the blocks that matter about as well as the whole map does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saccade import ops
from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, captured, machinery, mass, prefill
from saccade.claims._contract import Claim, Evidence
from saccade.core.selection import Blocks, Selection
from saccade.core.site import Site
from saccade.measure.stats import mean_interval, paired
from saccade.methods.sparse.random import Random
from saccade.methods.sparse.xattention import Xattention

CLAIM = Claim(
    says="Sums along antidiagonals at stride 8 or 16 pick blocks that keep RULER, LongBench and video tasks at the"
    " level of full attention, at a fifth to a half of the pairs, better than pooled blocks and other samples do.",
    where="arXiv 2503.16428, section 3, tables 1 to 4, and its ablation of patterns",
    setting="Llama-3.1-8B, Qwen2-VL-7B and HunyuanVideo, 4k to 128k tokens; blocks of 128, thresholds 0.8 to 0.95",
    how="SmolLM2-135M at a quarter of the causal pairs: loss on the last 512 of 2,048 tokens of real prose, pass keys"
    " at 1,024; against full, random blocks, and sinks and window of as many pairs (streaming). And by layer the"
    " attention mass of its blocks, over that of blocks as many and as large chosen by the whole map, and against"
    " blocks chosen by pooled means. Blocks of 32 and 64: 2 to 60 times shorter than the paper, where attention is"
    " less sparse: scaled down. Speed is measured elsewhere.",
    counts="Perplexity within 3 %, pass keys within 10 points of full and 20 above streaming, better than random blocks"
    " and than streaming; 95 % of the mass that the whole map finds, and more than pooled means find.",
    tiers=("smoke", "cpu", "gpu"),
)
BUDGET = 0.25


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(Xattention())
    text, keys, losses, hits = prefill("xattention", BUDGET, tier, progress)
    masses, best = _masses(text)
    checks = [
        at_most("nats, minus full (3 %)", text.difference(losses["ours"], losses["full"]), math.log(1.03)),
        at_least("nats, random blocks minus ours", text.difference(losses["random"], losses["ours"]), 0.02),
        at_least("nats, streaming minus ours", text.difference(losses["near"], losses["ours"]), 0.0),
        at_least("pass keys, minus full", keys.difference(hits["ours"], hits["full"]), -0.10),
        at_least("pass keys, minus streaming", keys.difference(hits["ours"], hits["near"]), 0.20),
        at_least("mass over that of the whole map", mean_interval(masses["ours"]), 0.95),
        at_least("the same, minus pooled means", paired(masses["ours"], masses["pooled means"], False), 0.0),
    ]
    table = [{"who": who, "mass over the whole map's": sum(m) / len(m), "n": len(m)} for who, m in masses.items()]
    done = f"{text.what()}, {keys.what()}; mass on a text of 1,024 tokens"
    setting = f"{text.where()}; {done}; {BUDGET} of the causal pairs"
    reason = f"Blocks of that size hold {best:.2f} of the attention mass where the whole map chooses them."
    return Evidence(checks, setting, reason, table=text.rows() + keys.rows() + table)


def _masses(text: Bench) -> tuple[dict[str, list[float]], float]:
    """By layer: attention mass of blocks, over that of the blocks that the whole map gives, as many pairs; and the
    latter's mean."""
    methods = {"ours": Xattention(), "stride 16": Xattention(stride=16), "random": Random(part="prefill")}
    out: dict[str, list[float]] = {who: [] for who in [*methods, "pooled means"]}
    held: list[float] = []
    for site, q, k, v in captured(Subject(text.model), [text.samples[-1].context[:, :1024]], BUDGET):
        chosen = {who: method.select(q, k, site) for who, method in methods.items()}
        ours = chosen["ours"]
        assert isinstance(ours, Blocks), "a quarter of so many pairs is no dense map"
        exact = ops.antidiagonal_mass(q, k, block=ours.q_block, stride=1, scale=site.scale)
        pooled_q, pooled_k = (ops.pool_blocks(x, ours.q_block) for x in (q, k))
        means = ops.antidiagonal_mass(pooled_q, pooled_k, block=1, stride=1, scale=site.scale)
        best, chosen["pooled means"] = (_by(x, ours.q_block, site) for x in (exact, means))
        whole = mass(q, k, v, best, site)
        held.append(whole)
        for who, selection in chosen.items():
            out[who].append(mass(q, k, v, selection, site) / whole)
    return out, sum(held) / len(held)


def _by(score: Tensor, block: int, site: Site) -> Selection:
    """Blocks that hold most, shared out as the method does it."""
    first = torch.eye(score.shape[-1], dtype=torch.bool, device=score.device)
    first[:, 0] = True
    entry = ops.mass_before(score, first.expand_as(score))
    entry[..., 0] = -1
    row = site.budget.row_tokens(site.keys)
    return ops.cover_blocks(entry, queries=site.queries, keys=site.keys, block=block, row_tokens=row)
