"""Combiner: summaries of far regions are worth more than single far tokens at the same cost, and near dense."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from saccade.claims._contract import Check, Claim, Evidence, Progress
from saccade.claims._seeds import less, scores, silent, surely_above, surely_at_least, surely_at_most, trained, training
from saccade.core import rng
from saccade.core.method import Slot
from saccade.measure.training import train
from saccade.methods.mixers.combiner import CHOICES, Combiner
from saccade.methods.nets._models import drawn

CLAIM = Claim(
    says="Each sparse pattern (fixed, logsparse, axial) becomes full attention when its far keys are summaries of"
    " regions, at the same cost, and is then better than the pattern itself and near dense attention.",
    where="arXiv 2107.05768, section 5, tables 1 to 5: 2.77 bits on CIFAR-10, 3.42 on ImageNet-64, Wiki-40B",
    setting="12 layers of 768 channels on Wiki-40B with rows of 2,048 tokens, and images of 1,024 to 12,288 pixels",
    how="A byte-level model of 2 layers trained from scratch on Moby-Dick, rows of 128 bytes, segments of 16, 5 seeds:"
    " each pattern with summaries, and with one token of each region in their place (the last of a segment or block,"
    " the column's in a row), full attention, and random blocks as dense as the fixed pattern. The axial pattern, both"
    " ways, on digits of 8 x 8 pixels. Same steps and initial weights. So small a model of so short rows, trained so"
    " shortly, tests the ordering, not the paper's figures.",
    counts="Each pattern better with summaries than with single tokens; the fixed one within 3 % of the bits of full"
    " attention and better than random blocks; axial digits within 2 points of full and no worse than single tokens.",
    tiers=("smoke", "cpu", "gpu"),
)
PATTERNS = CHOICES["pattern"]
TOKENS, SEGMENT = 128, 16
STEPS, ROWS, DIGITS = 120, 4, 16  # at tier "cpu"


class Single(Combiner):
    """The pattern without summaries: one token stands for each region."""

    def _summed(self, q, k, v, size):
        last = torch.arange(size, k.shape[2] + size, size, device=k.device).clamp(max=k.shape[2]) - 1
        return k[:, :, last], v[:, :, last]

    def _rows(self, q, k, v):
        return k, v


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return _smoke()
    arms: dict[str, Any] = {}
    for pattern in PATTERNS:
        arms[pattern] = f"combiner:pattern={pattern},segment_tokens={SEGMENT}"
        arms[f"{pattern}, single tokens"] = _single(pattern)
    axial = {name: arm for name, arm in arms.items() if name.startswith("axial")}
    text, pictures = training(tier, ROWS, STEPS), training(tier, DIGITS, STEPS)
    bits, table = _trained("mobydick", arms, density("fixed", TOKENS), text | {"tokens": TOKENS}, progress)
    hits, more = _trained("digits", axial, density("axial", 64, (8, 8)), pictures, progress)
    checks = []
    for pattern in PATTERNS:
        worse = less(bits[f"{pattern}, single tokens"], bits[pattern])
        checks.append(surely_above(f"bits, {pattern}, single tokens minus summaries", worse))
    dense = less(bits["fixed"], [1.03 * x for x in bits["full"]])
    checks += [
        surely_at_most("bits, fixed minus full (3 %)", dense, 0.0),
        surely_above("bits, random minus fixed", less(bits["random"], bits["fixed"])),
        surely_at_least("digits, axial minus full", less(hits["axial"], hits["full"]), -0.02),
        surely_at_least("digits, axial minus single tokens", less(hits["axial"], hits["axial, single tokens"]), 0.0),
    ]
    setting = f"2 layers of 64 channels, {trained(text, f'rows of {TOKENS}')}; {pictures['rows']} digits a step"
    return Evidence(checks, setting, table=table + more)


def density(pattern: str, n: int, grid: tuple[int, int] | None = None) -> float:
    """Logits of a layer over those of dense attention."""
    layer = Combiner(Slot(16, 4, causal=grid is None, grid=grid), pattern=pattern, segment_tokens=SEGMENT)
    near = float(layer._near(n, n, layer.slot.causal).count().max())
    far = int((layer._lists(n, torch.device("cpu")) >= 0).sum())
    return (near + far) / (n * (n + 1) / 2 if grid is None else n * n)


def _single(pattern: str) -> Any:
    return lambda slot: Single(slot, pattern=pattern, segment_tokens=SEGMENT)


def _trained(
    task: str, arms: dict[str, Any], budget: float, sizes: dict[str, Any], progress: Progress | None
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Scores of each arm over the seeds, and lines for the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = train(task, arms, folder, budget=budget, layers=2, **sizes, progress=progress or silent)
    table = [{"task": task, "who": x["mixer"], found["metric"]: x["score"]["mean"]} for x in found["mixers"]]
    return scores(found), table


def _smoke() -> Evidence:
    """Each pattern is its distribution written out, both ways; it says nothing about the paper."""
    x, checks = torch.randn(1, 11, 16, generator=rng.generator("smoke"), dtype=torch.float64), []
    for pattern in PATTERNS:
        for causal in (True, False):
            with drawn(0, "smoke"):
                layer = Combiner(Slot(16, 4, causal=causal), pattern=pattern, segment_tokens=4).double()
            with torch.no_grad():
                apart = float((layer(x)[0] - layer.reference(x)).abs().max())
                least = float((layer.distribution(x).sum(-1) - 1).abs().max())
            bar = torch.finfo(torch.float32).eps
            name = f"{pattern}, {'causal' if causal else 'both ways'}"
            checks.append(Check(f"{name}: difference from the equation", apart, apart, apart, bar, apart <= bar))
            checks.append(Check(f"{name}: sums of rows, away from 1", least, least, least, bar, least <= bar))
    table = [{"who": who, "density": share} for who, share in (("full", 1.0), ("random", density("fixed", TOKENS)))]
    return Evidence(checks, "random weights, 11 tokens: the machinery, not the paper", table=table)
