"""Is a mixer better than its baseline? By the interval of their difference over the seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from saccade.measure.stats import Estimate, paired

Verdict = Literal["held", "unclear", "not held"]


def orderings(
    lines: Sequence[Mapping[str, Any]], mixers: Sequence[str], against: Sequence[str], higher: bool
) -> Iterator[dict[str, Any]]:
    """Of each mixer against each baseline: by how much it is better, seed by seed, and the verdict.

    lines: of the summary; higher: whether a higher score is better
    """
    scores = {line["mixer"]: line["scores"] if higher else [-x for x in line["scores"]] for line in lines}
    for one in mixers:
        for other in against:
            if one != other:
                found = paired(scores[one], scores[other], hits=False)
                yield {"mixer": one, "against": other, "better_by": figures(found), "verdict": verdict(found)}


def verdict(better: Estimate) -> Verdict:
    """Held if the whole interval lies above 0, not held if none of it does; of one seed nothing is known."""
    if better.n < 2 or better.low <= 0 < better.high:
        return "unclear"
    return "held" if better.low > 0 else "not held"


def figures(found: Estimate) -> dict[str, float | None]:
    """Mean and interval; of one seed there is no interval."""
    alone = found.n < 2
    return {"mean": found.mean, "low": None if alone else found.low, "high": None if alone else found.high}
