"""What a claim is: what a paper says, how we measure it again, and what was found. The verdict is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["reproduced", "in part", "unclear", "not reproduced", "not attempted"]
Progress = Callable[[int, int, str], None]
TIERS = ("smoke", "cpu", "gpu")
SEED = 0  # of samples, random baselines and everything else that a claim draws


@dataclass(frozen=True)
class Claim:
    """The paper's side, fixed before anything is measured.

    says: the statement in one sentence; where: section, table or figure; setting: the paper's models and hardware
    how: what we do instead; counts: what would count as reproduced; tiers: at which it can be measured
    """

    says: str
    where: str
    setting: str
    how: str
    counts: str
    tiers: tuple[str, ...] = ("smoke", "cpu")

    def __post_init__(self):
        assert all(vars(self).values()), f"a claim leaves nothing open: {self}"


@dataclass(frozen=True)
class Check:
    """One figure with its interval, held against a bar that was set before.

    n: samples; smallest_effect: the smallest distance from the bar that so many show four times in five
    unclear: it does not hold, and the samples are too few to say that it fails
    """

    name: str
    value: float
    low: float
    high: float
    bar: float
    holds: bool
    n: int = 1
    smallest_effect: float = 0.0
    unclear: bool = False

    def __post_init__(self):
        assert self.name, "a check has a name"
        if math.isnan(self.value):
            assert not self.holds, f"{self.name}: what is not a number holds nothing"
        assert not (self.holds and self.unclear), f"{self.name}: what holds is clear"


@dataclass(frozen=True)
class Evidence:
    """What one measurement found. `setting` is ours; `reason` says why a check failed; `table` holds all numbers."""

    checks: Sequence[Check]
    setting: str
    reason: str = ""
    table: Sequence[Mapping[str, Any]] = ()

    @property
    def verdict(self) -> Verdict:
        """All checks hold: reproduced. Some: in part. None: not reproduced, or unclear if any check is. No checks: not
        attempted."""
        held = sum(check.holds for check in self.checks)
        if not self.checks:
            return "not attempted"
        if held == len(self.checks):
            return "reproduced"
        if held:
            return "in part"
        return "unclear" if any(check.unclear for check in self.checks) else "not reproduced"


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which has no infinities: a figure that is none becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
