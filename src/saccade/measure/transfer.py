"""The transfer table: each method at each budget on each task, held against `full` and against chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from saccade.measure import stats
from saccade.measure.cells import FULL

Line = Mapping[str, Any]
# "below": chance does better, and the interval of the difference leaves zero out; "lower": it does better on average,
# but is not told apart; "no random": none of the same budget ran in a part of its; "baseline": full and random
Standing = Literal["below", "lower", "not below", "no random", "baseline"]

CHANCE = "random"
SPENT = {"packing": "cache"}  # what packing saves is memory, so its chance is that of eviction
FIGURES = ("label", "part", "budget", "task", "diff", "diff_low", "diff_high", "seen")


def transfer(
    lines: Sequence[Line], rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One cell for each of `rows`, in their order; `lines` hold the samples that they were made from, row for row.

    `standing` compares with `random` on the same samples. Of a method with several parts, with the one of those randoms
    that does best: it spends as much on less of the work.
    """
    return [{name: row[name] for name in FIGURES} | _beside(line, lines, tasks) for line, row in zip(lines, rows)]


def _beside(line: Line, lines: Sequence[Line], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """How a cell stands to chance, and the paired difference to it."""
    if line["method"] in (FULL, CHANCE):
        return {"standing": "baseline", "random": None}
    hits = tasks[line["task"]]["metric"] == "hit"
    rivals = [x for x in lines if _is_chance_of(x, line)]
    if not rivals:
        return {"standing": "no random", "random": None}
    best = (max if hits else min)(rivals, key=lambda x: sum(scores(x)))
    apart = stats.paired(scores(line), scores(best), hits)
    low, high = stats.finite(apart.low), stats.finite(apart.high)
    gap = {"label": best["label"], "diff": apart.mean, "diff_low": low, "diff_high": high}
    return {"standing": _standing(apart.mean, low, high, hits), "random": gap}


def _is_chance_of(other: Line, line: Line) -> bool:
    """Whether another line is a random choice of the same budget, on the same task, in a part of this one's."""
    if other["method"] != CHANCE or any(other[name] != line[name] for name in ("task", "budget")):
        return False
    return other["part"] in [SPENT.get(part, part) for part in (line["part"] or "").split("+")]


def _standing(mean: float, low: float | None, high: float | None, hits: bool) -> Standing:
    """`mean` and its interval are of score minus score of chance; a loss is better where it is lower."""
    if mean == 0 or (mean > 0) == hits:
        return "not below"
    end = high if hits else low
    return "below" if end is not None and (end < 0 if hits else end > 0) else "lower"


def scores(line: Line) -> list[float]:
    """Of its samples, in their order."""
    return [sample["score"] for sample in line["samples"]]
