"""What claims on nets trained here share: from how many seeds, where, and checks that the whole interval decides.

Of a handful of seeds the mean alone tells little. So a check holds only if the whole interval does, and one whose
interval lies on both sides of the bar is unclear: it neither holds nor speaks against the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from saccade.claims._bench import TIERS, at_least, at_most
from saccade.claims._contract import Check
from saccade.measure.stats import Estimate, paired

SEEDS = 5  # of every training, at every tier but the smoke tier
GPU_ROWS, GPU_STEPS = 8, 2  # times as many in a step, and steps: small nets leave a GPU idle


def surely_at_least(name: str, found: Estimate, bar: float) -> Check:
    """Holds if the whole interval reaches the bar."""
    return _decided(at_least(name, found, bar), found.low >= bar, found.high >= bar)


def surely_above(name: str, found: Estimate, bar: float = 0.0) -> Check:
    """Holds if the whole interval lies above the bar."""
    return _decided(at_least(name, found, bar), found.low > bar, found.high > bar)


def surely_at_most(name: str, found: Estimate, bar: float) -> Check:
    """Holds if the whole interval stays within the bar."""
    return _decided(at_most(name, found, bar), found.high <= bar, found.low <= bar)


def _decided(check: Check, holds: bool, could: bool) -> Check:
    return replace(check, holds=holds, unclear=could and not holds)


def less(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Ours minus theirs, seed by seed."""
    return paired(ours, theirs, hits=False)


def training(tier: str, rows: int, steps: int) -> dict[str, Any]:
    """How long a tier trains, from how many seeds, and where; rows, steps: at tier "cpu"."""
    if tier == "gpu":
        rows, steps = rows * GPU_ROWS, steps * GPU_STEPS
    return {"rows": rows, "steps": steps, "seeds": SEEDS, "device": TIERS[tier].device}


def trained(made: Mapping[str, Any], of: str) -> str:
    """`training`, for the setting of a claim; of: what a row is."""
    there = " on a GPU" if made["device"] == "cuda" else ""
    return f"float32{there}; {made['steps']} steps of {made['rows']} {of}, {made['seeds']} seeds"


def scores(summary: Mapping) -> dict[str, list[float]]:
    """Of what `train` returned: score of each mixer, seed by seed."""
    return {line["mixer"]: line["scores"] for line in summary["mixers"]}


def silent(done: int, total: int, text: str) -> None:
    """Progress that nobody asked for."""
