"""docs/frontier.md and its pictures: what whole families keep of the quality at each budget. Called by docs/make.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from svg import INK, MUTED, Look, Panel, Series, log_ticks, picture  # noqa: E402

from saccade.report import tables  # noqa: E402
from saccade.report.figures import COLOURS  # noqa: E402
from saccade.report.run import Run  # noqa: E402
from saccade.report.words import MISSING, say  # noqa: E402

LEAST_LOSS = 1e-3  # nats above full: what loses less is drawn here
COLUMNS = 3
FORMS = ("circle", "square", "diamond", "triangle")
DASHES = {"random": "2 3", "streaming": "6 3", "oracle-topk": "8 3 2 3"}
# part -> what a picture of it is called, and the stage of which the time is drawn beside
PARTS = {"cache": ("Keys dropped or packed after the prompt", "decode"),
         "decode": ("Keys left unread while decoding", "decode"),
         "prefill": ("Pairs left out of the prompt", "prefill")}  # fmt: skip
STAGES = {"prefill": "prefill", "decode": "decoding"}
Row = list[str]


def parts(run: Run) -> list[str]:
    """Those that are drawn of a run: what its methods, baselines apart, do first."""
    mine = {_part(run, row) for row in run.rows if not row["baseline"]}
    return [part for part in PARTS if part in mine]


def _part(run: Run, row: dict[str, Any]) -> str:
    """`prefill+cache` is seen with what drops, as packing is, but in a run over sparse attention with its like; what
    composes otherwise, by its first part."""
    own = (row["part"] or "").replace("packing", "cache").split("+")
    return "cache" if "cache" in own and run.run.get("families") != ["sparse"] else own[0]


def drawn(run: Run, part: str) -> str:
    """A panel for each task, and one of time where that was measured."""
    rows = [row for row in run.rows if row["method"] != "full" and _shown(run, row, part)]
    looks = _looks(rows)
    panels = [_panel(run, task, [r for r in rows if r["task"] == task], looks) for task in run.compared]
    return picture(PARTS[part][0], [p for p in panels if p.series] + _time(run, part, rows, looks), COLUMNS)


def _shown(run: Run, row: dict[str, Any], part: str) -> bool:
    if row["method"] == "random":
        return row["part"] == part
    return row["baseline"] or _part(run, row) == part


def _looks(rows: Sequence[dict[str, Any]]) -> dict[str, Look]:
    chosen = zip(itertools.cycle(COLOURS[:-1]), itertools.cycle(FORMS))
    methods = {row["label"]: row["method"] for row in rows}
    return {
        label: Look(MUTED, "cross", dash=DASHES[name]) if name in DASHES else Look(*next(chosen))
        for label, name in methods.items()
    }


def _panel(run: Run, task: str, rows: Sequence[dict[str, Any]], looks: dict[str, Look]) -> Panel:
    """Against what was kept; one that takes no budget has no place there."""
    lower = run.summary["tasks"][task]["metric"] == "nll"
    value: Callable[[dict[str, Any]], float] = _loss if lower else lambda row: row["mean"]
    series = [
        Series(label, looks[label], sorted((_asked(row), value(row)) for row in rows if row["label"] == label))
        for label in dict.fromkeys(row["label"] for row in rows if row["budget"] != "1")
    ]
    shares = sorted({x for s in series for x, _ in s.points})
    full = next(row["mean"] for row in run.rows if (row["method"], row["task"]) == ("full", task))
    level = None if lower else (full, "full", Look(INK, ""))
    ticks = [(x, say(x, "share").replace(".0 %", " %")) for x in shares]
    y = "nats above full" if lower else "hits"
    return Panel(task, "budget: what may be kept", y, ticks, series, log=lower, top=1.0, level=level)


def _asked(row: dict[str, Any]) -> float:
    return float(row["budget"])


def _loss(row: dict[str, Any]) -> float:
    return max(row["diff"], LEAST_LOSS)


def _time(run: Run, part: str, rows: Sequence[dict[str, Any]], looks: dict[str, Look]) -> list[Panel]:
    """Hits against speed, at the longest text and the budget that were timed."""
    stage, timed = PARTS[part][1], _timed(run)
    series = []
    for label in dict.fromkeys(row["label"] for row in rows):
        row, hits = timed.get(label), _hits(run, label, timed[label]["budget"] if label in timed else "")
        if row and hits is not None and row[f"{stage}_speedup"]:
            series.append(Series(label, looks[label], [(row[f"{stage}_speedup"], hits)]))
    if not series:
        return []
    speeds = [s.points[0][0] for s in series] + [1.0]
    ticks = [(x, f"{x:g} ×") for x in log_ticks(min(speeds), max(speeds))]
    title = f"{STAGES[stage]} at {say(max(r['tokens'] for r in timed.values()), 'count')} tokens, as fast as full"
    return [Panel(title, "larger is faster", "hits, mean of the tasks", ticks, series, log=False, top=1.0)]


def _timed(run: Run) -> dict[str, dict[str, Any]]:
    """label -> its row of the longest text, at the budget that the run timed."""
    rows = [r for r in run.summary["speed"] if r["budget"] in ("1", run.run["timed_budget"])]
    longest = max((r["tokens"] for r in rows), default=0)
    return {r["label"]: r for r in rows if r["tokens"] == longest}


def _hits(run: Run, label: str, budget: str) -> float | None:
    """Mean over the tasks that count hits; none where a cell is missing, since tasks are not equally hard."""
    found = [r["mean"] for r in run.rows if (r["label"], r["budget"]) == (label, budget) and _is_hit(run, r["task"])]
    whole = len(found) == sum(_is_hit(run, task) for task in run.compared)
    return sum(found) / len(found) if whole else None


def _is_hit(run: Run, task: str) -> bool:
    return run.summary["tasks"][task]["metric"] == "hit"


# --- the table --------------------------------------------------------------------------------------------------------


def table(run: Run) -> tuple[Row, list[Row]]:
    """A method a line: hits and loss at each budget, on how many tasks it is below chance, and its speed."""
    budgets = [b for b in dict.fromkeys(row["budget"] for row in run.rows) if b != "1"]
    timed = _timed(run)
    kinds = {"hits": _said_hits, "loss": _said_loss}
    said = [kind for kind in kinds if any(_is_hit(run, task) == (kind == "hits") for task in run.compared)]
    heads = ["method", "part", *[f"{kind}, {b}" for b in budgets for kind in said], "below random"]
    heads += [f"{word}, as fast as full" for word in STAGES.values()] if timed else []
    rows = []
    for label in run.labels:
        first = next(row for row in run.rows if row["label"] == label)
        there = [first["budget"]] * len(budgets) if first["budget"] == "1" else budgets
        row = [label, (first["part"] or MISSING).replace("+", " + ")]
        row += [kinds[kind](run, label, budget) for budget in there for kind in said]
        row.append(_below(run, label))
        speeds = [timed.get(label, {}).get(f"{stage}_speedup") for stage in STAGES] if timed else []
        rows.append(row + [say(x, "times") for x in speeds])
    return heads, rows


def _said_hits(run: Run, label: str, budget: str) -> str:
    hits = _hits(run, label, budget)
    return MISSING if hits is None else f"{hits:.2f}"


def _said_loss(run: Run, label: str, budget: str) -> str:
    """The worst of the tasks that measure a loss."""
    mine = [r for r in run.rows if (r["label"], r["budget"]) == (label, budget) and not _is_hit(run, r["task"])]
    return say(max((r["diff"] for r in mine), default=None), "difference")


def _below(run: Run, label: str) -> str:
    """On how many of its cells."""
    mine = [x for x in run.summary["transfer"] if x["label"] == label]
    judged = [x for x in mine if x["standing"] not in ("baseline", "no random")]
    worse = sum(x["standing"] in ("below", "lower") for x in judged)
    return f"{worse} of {len(judged)}" if judged else MISSING


def absent(run: Run) -> Iterator[str]:
    """What is left out, and why."""
    for cells in tables.absent(run).rows:
        yield ": ".join([f"`{cells[0].text}` {cells[1].text}", cells[2].text])
