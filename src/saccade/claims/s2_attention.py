"""S2-Attention: stripes that together are the whole text train like dense attention; one stripe for all does not."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saccade import models
from saccade.attach import attach
from saccade.claims._bench import TIERS, Progress, at_least, at_most, machinery
from saccade.claims._contract import SEED, Claim, Evidence
from saccade.claims._planted import Planted, parts
from saccade.claims._seeds import training
from saccade.core import rng
from saccade.core.method import Method
from saccade.core.site import Site
from saccade.measure.stats import hit_rate, mean_interval, paired
from saccade.methods.sparse.random import Random
from saccade.methods.sparse.s2_attention import S2Attention, coverage

CLAIM = Claim(
    says="Heads that see different stripes of the context, which together are all of it, train to the quality of dense"
    " attention and find a needle at any depth; heads that all see the same part do not.",
    where="arXiv 2407.17678, sections 3 and 4: heterogeneous against homogeneous heads, needle in a haystack",
    setting="1.3B and 7B models trained from the beginning, 8k to 128k tokens, local 512 tokens, a stride of 16 blocks",
    how="A Llama of two layers and four heads, trained for 300 steps on 64 bytes of Moby-Dick each, in which one of"
    " four needles is planted and asked for by the last 16 bytes: dense, stripes of every fourth block of 8 bytes with"
    " one local block, the same stripe for all heads, and the local block with the text's first block alone. Random"
    " blocks, as many pairs, are read by the dense model. Tested on later chapters. Scaled down very far.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Needles within 5 points of dense, 30 above the same stripe for all heads and above the local block;"
    " perplexity of the text within 2 % of dense.",
)
STEPS, RATE, ROWS, BYTES, ASKED = 300, 3e-3, 16, 64, 16
TESTS = 256  # texts
OURS = S2Attention(block_tokens=8, local_blocks=1, vert_stride=4)
TRAINED = {
    "full": None,
    "s2-attention": OURS,
    "one stripe for all heads": S2Attention(8, 1, 4, homo_head=True),
    "local and first block": S2Attention(8, 1, BYTES, homo_head=True),
}


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu", which trains longer, on more of the same short texts."""
    if tier == "smoke":
        return machinery(S2Attention(block_tokens=8))
    source, later = parts()
    made, many = training(tier, ROWS, STEPS), TESTS * TIERS[tier].more
    rows, steps, device = (made[name] for name in ("rows", "steps", "device"))
    tests = _texts(later, many, rng.generator("claims/s2-attention/tests", SEED), device)
    found, shares, dense = {}, {}, None
    for i, (name, method) in enumerate(TRAINED.items()):
        if progress is not None:
            progress(i, len(TRAINED), f"training: {name}")
        model = _trained(method, source, rows, steps, device)
        dense = dense or model
        with _under(model, method) as run:
            found[name], shares[name] = _scores(tests, model.eval()), run.record.density("prefill") if run else 1.0
    for name, method in {"random": Random(part="prefill", block_tokens=8), "stripes, not trained with": OURS}.items():
        with _under(dense, method, shares["s2-attention"] if name == "random" else 1.0) as run:
            found[name], shares[name] = _scores(tests, dense), run.record.density("prefill")
    nats, hits = ({name: both[i] for name, both in found.items()} for i in (0, 1))
    stripe, local = list(TRAINED)[2:]
    checks = [
        at_least("needles, minus full", paired(hits["s2-attention"], hits["full"], True), -0.05),
        at_least("needles, minus one stripe for all", paired(hits["s2-attention"], hits[stripe], True), 0.30),
        at_least("needles, minus the local block", paired(hits["s2-attention"], hits[local], True), 0.30),
        at_most("nats per byte, minus full (2 %)", paired(nats["s2-attention"], nats["full"], False), math.log(1.02)),
    ]
    where = "float32 on a GPU" if device == "cuda" else "float32"
    setting = f"two layers, four heads of 16, {where}; {steps} steps of {rows} texts of {BYTES} bytes; {many} to test"
    here = Site(0, 2, 4, 4, 16, "prefill", BYTES, BYTES, BYTES, 1.0)
    seen = {name: coverage(m.shards(BYTES, here), 4) for name, m in TRAINED.items() if m}
    reason = f"Share of far blocks that some head sees: {seen}."
    means = {name: (hit_rate(hits[name]).mean, mean_interval(nats[name]).mean) for name in found}
    table = [{"who": n, "pairs": shares[n], "needles": hit, "nats per byte": nat} for n, (hit, nat) in means.items()]
    return Evidence(checks, setting, reason, table=table)


def _texts(source: Int[Tensor, " m"], rows: int, draw: torch.Generator, device: str) -> Planted:
    return Planted.draw(source, BYTES, rows, draw, run=1, asked=ASKED).to(device)


@torch.no_grad()
def _scores(texts: Planted, model: Any) -> tuple[list[float], list[float]]:
    """Of each text: nats per byte, and whether the last place names the needle."""
    logits = model(texts.ids, use_cache=False).logits
    return texts.losses(logits)[0].tolist(), (logits[:, -1].argmax(-1) == texts.needle).double().tolist()


def _under(model: Any, method: Method | None, budget: float = 1.0) -> Any:
    return attach(model, method, budget=budget) if method else contextlib.nullcontext()


def _trained(method: Method | None, source: Int[Tensor, " m"], rows: int, steps: int, device: str) -> Any:
    """From the same weights and on the same texts, whatever the method."""
    model = models.tiny("llama", layers=2, heads=4, kv_heads=4, head_size=16, seed=SEED).train().to(device)
    optimiser, draw = torch.optim.AdamW(model.parameters(), lr=RATE), rng.generator("claims/s2-attention", SEED)
    with _under(model, method), torch.enable_grad():
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / steps)
            texts = _texts(source, rows, draw, device)
            text, asked = texts.losses(model(texts.ids, use_cache=False).logits)
            optimiser.zero_grad()
            (text.mean() + asked.mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    return model
