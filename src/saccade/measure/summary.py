"""From the lines of cells to summary.json: a pure function, so a resumed run ends with the same summary."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.measure import stats
from saccade.measure.cells import FULL, SCHEMA
from saccade.measure.transfer import scores, transfer

Line = Mapping[str, Any]
BREAKS = 24  # at most so many are shown


def summarise(run: Mapping[str, Any], lines: Mapping[str, Line]) -> dict[str, Any]:
    """The summary of the cells that `run` plans; `lines` are results by key, further ones are ignored."""
    done = [lines[key] for key in run["cells"] if key in lines]
    scored = [line for line in done if line["kind"] == "quality" and line["error"] is None]
    full = {line["task"]: line for line in scored if line["label"] == FULL and not line["repeat"]}
    again = {line["task"]: line for line in scored if line["repeat"]}
    noise = {task: _noise(full[task], again[task]) for task in full if task in again}
    tasks = run["tasks"]
    compared = [line for line in scored if line["task"] in full and not line["repeat"]]
    rows = [_row(line, full[line["task"]], tasks, noise) for line in compared]
    rounds = [line for line in done if line["kind"] == "speed" and line["error"] is None]
    return {
        "schema": SCHEMA,
        "model": run["model"],
        "tasks": tasks,
        "noise": noise,
        "rows": rows,
        "transfer": transfer(compared, rows, tasks),
        "not_exercised": run["not_exercised"],
        "left_out": run["left_out"],
        "failed": [_failure(line, line) for line in done if line["error"]] + _failed_timings(rounds),
        "missing": sum(key not in lines for key in run["cells"]),
        "speed": speed_rows(rounds),
        "crossover": crossovers(rounds),
        "breaks": _breaks(scored, full, tasks),
        "repeat": [run["command"]],
    }


def _noise(first: Line, second: Line) -> float:
    """Half-width of the band in which the mean of `full` moves with rounding alone: the larger of what the two means
    differ by, and 1.96 standard errors of their differences per sample."""
    apart = stats.paired(*(scores(line) for line in (second, first)), hits=False)
    return max(abs(apart.mean), 1.96 * apart.sd / math.sqrt(apart.n))


# --- quality ----------------------------------------------------------------------------------------------------------


def _row(line: Line, full: Line, tasks: Mapping[str, Any], noise: Mapping[str, float]) -> dict[str, Any]:
    hits = tasks[line["task"]]["metric"] == "hit"
    mean = (stats.hit_rate if hits else stats.mean_interval)(scores(line))
    row = {name: line[name] for name in ("method", "label", "part", "budget", "task", "tokens", "baseline")}
    row |= {"n": mean.n, "mean": mean.mean, "low": stats.finite(mean.low), "high": stats.finite(mean.high)}
    row |= _difference(line, full, hits, noise.get(line["task"]))
    if not hits and line["label"] != FULL:
        row["perplexity_ratio"] = math.exp(row["diff"])
    times = {name: stats.median_spread([s[name] for s in line["samples"]])["median"] for name in TIMES}
    return row | line["achieved"] | times | {"seconds_warmup": line["seconds_warmup"], "back_ends": line["back_ends"]}


TIMES = ("seconds_prefill", "seconds_decode")


def _difference(line: Line, full: Line, hits: bool, noise: float | None) -> dict[str, Any]:
    """Paired difference to full; of full itself there is none to be seen."""
    if line["key"] == full["key"]:
        return {"diff": 0.0, "diff_low": 0.0, "diff_high": 0.0, "smallest_effect": None, "seen": False}
    apart = stats.paired(scores(line), scores(full), hits)
    low, high = stats.finite(apart.low), stats.finite(apart.high)
    sure = low is not None and high is not None and not low <= 0 <= high
    return {
        "diff": apart.mean,
        "diff_low": low,
        "diff_high": high,
        "smallest_effect": stats.finite(apart.smallest_effect),
        "seen": sure and abs(apart.mean) > (noise or 0.0),
    }


def _breaks(scored: Sequence[Line], full: Mapping[str, Line], tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Samples right under full and wrong under a method that is no baseline; the largest budgets first."""
    found = []
    for line in sorted(scored, key=lambda x: -_amount(x["budget"])):
        if line["baseline"] or tasks[line["task"]]["metric"] != "hit" or line["task"] not in full:
            continue
        for sample, base in zip(line["samples"], full[line["task"]]["samples"]):
            if base["score"] and not sample["score"]:
                row = {name: line[name] for name in ("method", "label", "budget", "task")}
                row |= {name: sample[name] for name in ("id", "facts", "score", "asked", "expected", "said")}
                found.append(row | {"full": base["score"]})
    return found[:BREAKS]


def _amount(budget: str) -> float:
    return float("".join(c for c in budget if c in "0123456789.e+-"))


def _failure(line: Line, entry: Line) -> dict[str, Any]:
    names = {name: entry[name] for name in ("label", "budget")}
    return names | {"task": line["task"], "tokens": line["tokens"], **entry["error"]}


# --- speed ------------------------------------------------------------------------------------------------------------


def _by_contestant(rounds: Sequence[Line]) -> dict[tuple[str, str, int], list[Line]]:
    found = defaultdict(list)
    for line in rounds:
        for measure in line["measures"]:
            if measure["error"] is None:
                found[measure["label"], measure["budget"], line["tokens"]].append(measure)
    return found


def _failed_timings(rounds: Sequence[Line]) -> list[dict[str, Any]]:
    failed = [_failure(line, m) for line in rounds for m in line["measures"] if m["error"]]
    return list({tuple(f.values()): f for f in failed}.values())


def speed_rows(rounds: Sequence[Line]) -> list[dict[str, Any]]:
    """One per contestant and length: medians over the rounds, their spread, and the time over that of full."""
    found, rows = _by_contestant(rounds), []
    for (label, budget, tokens), measures in found.items():
        row = {"method": measures[0]["method"], "label": label, "part": measures[0]["part"], "budget": budget}
        row |= {"tokens": tokens, "rounds": len(measures), "bytes_held": measures[0]["bytes_held"]}
        for stage in ("prefill", "decode", "warmup"):
            times = stats.median_spread([m[f"{stage}_seconds"] for m in measures])
            row |= {f"{stage}_seconds": times["median"], f"{stage}_spread": times["high"] - times["low"]}
        base = found.get((FULL, "1", tokens), [])
        row |= {f"{stage}_speedup": _speedup(measures, base, stage) for stage in ("prefill", "decode")}
        rows.append(row)
    return sorted(rows, key=lambda r: (r["label"] != FULL, r["label"], r["budget"], r["tokens"]))


def _speedup(measures: Sequence[Line], base: Sequence[Line], stage: str) -> float | None:
    """Median over the rounds of full's time over the method's time in the same round."""
    if len(measures) != len(base):
        return None
    name = f"{stage}_seconds"
    return stats.median_spread([b[name] / m[name] for m, b in zip(measures, base)])["median"]


def crossovers(rounds: Sequence[Line]) -> list[dict[str, Any]]:
    """From which length on each contestant is faster than full, in the stages that it has a part in.

    None where it is not, in the lengths measured, or at the longest not in every round: that is noise.
    """
    rows, found = defaultdict(list), _by_contestant(rounds)
    for row in speed_rows(rounds):
        if row["label"] != FULL and row["prefill_speedup"] is not None:
            rows[row["method"], row["label"], row["budget"], row["part"]].append(row)
    return [
        {"method": method, "label": label, "budget": budget, "stage": stage} | {"tokens": _crossing(mine, stage, found)}
        for (method, label, budget, part), mine in rows.items()
        for stage, parts in STAGES.items()
        if parts & set((part or "").split("+"))
    ]


# stage -> the parts of the work that change its time, in the words of a row
STAGES = {"prefill": {"prefill"}, "decode": {"decode", "cache"}}


def _crossing(rows: Sequence[dict[str, Any]], stage: str, found: Mapping[Any, Sequence[Line]]) -> float | None:
    longest = max(rows, key=lambda r: r["tokens"])
    mine = found[longest["label"], longest["budget"], longest["tokens"]]
    full = found[FULL, "1", longest["tokens"]]
    name = f"{stage}_seconds"
    if any(m[name] >= f[name] for m, f in zip(mine, full)):
        return None
    return stats.crossover([r["tokens"] for r in rows], [1 / r[f"{stage}_speedup"] for r in rows])
