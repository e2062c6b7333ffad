"""SnapKV: what its last tokens vote for is what the answer needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.attach import attach
from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.core.method import Cache
from saccade.measure.contestants import parse
from saccade.measure.stats import mean_interval
from saccade.methods.cache.snapkv import SnapKV
from saccade.methods.cache.streaming import Streaming

CLAIM = Claim(
    says="A small cache, voted for by the last prompt tokens, answers like the full one: with 1024 of 16k to 380k"
    " tokens kept, retrieval is nearly unhurt; without pooling it drops sharply.",
    where="arXiv 2404.14469, sections 4.2 and 5.1, figures 5 and 6 (needle, LongEval)",
    setting="LWM-Text-Chat-1M and Mistral-7B-Instruct, 16k to 380k tokens, one A100",
    how="Pass keys in real prose asked for at the end of the prompt, SmolLM2-135M at 512 and 1,024 tokens, an"
    " eighth kept, the paper's needle setting of 16 voting tokens; against full, random and streaming caches"
    " of the same size, and against itself without pooling; share of the answer's attention to the prompt that"
    " falls on kept keys. Shorter and with a smaller model than the paper: scaled down.",
    counts="At an eighth of the keys within 5 points of the full cache, 30 above streaming and random, pooling 5 above"
    " no pooling; four fifths of the answer's attention on kept keys, 1.3 times streaming's.",
)
BUDGET = 0.125
SAMPLES = 10  # per length: of 20 in all, one that is lost stays within 5 points
OURS = "snapkv:window_tokens=16"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke" or "cpu"."""
    if tier == "smoke":
        return machinery(SnapKV(window_tokens=8))
    asked = Bench("passkey", (512, 1024), SAMPLES, progress)
    ours, plain = asked.scores(OURS, BUDGET), asked.scores(f"{OURS},pool_tokens=1", BUDGET)
    versus = {
        "snapkv minus full": (asked.scores("full"), -0.05),
        "snapkv minus streaming": (asked.scores("streaming", BUDGET), 0.30),
        "snapkv minus random": (asked.scores("random:part=evict", BUDGET), 0.30),
        "pooling minus no pooling": (plain, 0.05),
    }
    checks = [at_least(name, asked.difference(ours, theirs), bar) for name, (theirs, bar) in versus.items()]
    later = Bench("passkey-agnostic", (512,), 10, progress, (asked.model, asked.tokenizer))
    loss = later.difference(later.scores(OURS, BUDGET), later.scores("full"))
    some = asked.samples[:6]
    mass, near = (_mass(asked.model, some, spec) for spec in (parse(OURS).methods[0], Streaming()))
    checks.append(at_least("attention of the answer on kept keys", mean_interval(mass), 0.8))
    ratio = mean_interval([a / b for a, b in zip(mass, near)])
    checks.append(at_least("the same, over that on streaming's keys", ratio, 1.3))
    reason = (
        f"Without pooling {sum(plain):.0f} of {len(plain)} keys are found, with it {sum(ours):.0f}. Known weakness, not"
        " counted: with the question after the compression, snapkv minus full is"
        f" {loss.mean:+.2f} [{loss.low:+.2f}, {loss.high:+.2f}]."
    )
    setting = f"SmolLM2-135M-Instruct, float32; {SAMPLES} pass keys each in 512 and 1,024 tokens; {BUDGET} kept"
    return Evidence(checks, setting, reason=reason, table=asked.rows() + later.rows())


@torch.no_grad()
def _mass(model: Any, samples: Sequence[Any], method: Cache) -> list[float]:
    """Per sample: the share of the answer's attention to the prompt that falls on the keys that the method keeps."""
    out = []
    for sample in samples:
        with attach(model, method, budget=BUDGET) as run:
            model(sample.context, use_cache=True)
            kept = [run.record.layer(i).kept[0] for i in sorted(run.record.layers)]
        n = sample.context.shape[1]
        shares = []
        for layer, q, k, _ in Subject(model).capture_qkv([torch.cat([sample.context, sample.continuation], 1)]):
            paid = _paid(q, k, n)
            shares += [float(row[head.long()].sum() / row.sum()) for row, head in zip(paid, kept[layer])]
        out.append(sum(shares) / len(shares))
    return out


def _paid(q: Float[Tensor, "1 h n d"], k: Float[Tensor, "1 g n d"], prompt: int) -> Float[Tensor, "g p"]:
    """Attention that the tokens after the prompt pay to each of its keys, summed over them and over a group's heads."""
    grouped = q[0, :, prompt:].unflatten(0, (k.shape[1], -1))
    logits = grouped @ k[0, :, None].mT * q.shape[-1] ** -0.5
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(prompt + 1)
    return logits.masked_fill(ahead, -torch.inf).softmax(-1)[..., :prompt].sum((1, 2))
