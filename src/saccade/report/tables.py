"""The tables of a report, as text that every format shows alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saccade.report.run import Run
from saccade.report.words import MISSING, interval, say

if TYPE_CHECKING:
    from saccade.measure.attended import Attended

FULL = "full"
STAGES = {"prefill": "of the prompt", "decode": "after the prompt"}  # queries
# marks of a cell: grey, red, or none of them
NOISE, BELOW, BASE = "noise", "below", "base"
# how a cell stands to random at the same budget: its sign, and what that says
SIGNS = {
    "below": ("▼", "worse than random of the same budget, on the same samples: the interval leaves zero out"),
    "lower": ("▽", "worse than random on average, but not to be told from it"),
    "no random": ("○", "no random of the same budget ran beside it"),
}


@dataclass(frozen=True)
class Cell:
    """Text, the value to sort by, a mark ("noise", "below", "base" or ""), a sign of SIGNS and what it says here."""

    text: str
    value: float | str | None = None
    mark: str = ""
    sign: str = ""
    about: str = ""

    @property
    def signed(self) -> str:
        """Text and sign."""
        return f"{self.text} {self.sign}".strip()


@dataclass(frozen=True)
class Table:
    """What a figure was drawn from, or what is read by itself. `groups` lie over the last heads: (title, how many)."""

    caption: str
    heads: tuple[str, ...]
    rows: list[list[Cell]]
    groups: tuple[tuple[str, int], ...] = ()

    @property
    def titles(self) -> tuple[str, ...]:
        """The heads, each with the group that it lies in."""
        over = [title for title, count in self.groups for _ in range(count)]
        alone = len(self.heads) - len(over)
        return (*self.heads[:alone], *[f"{title}, {head}" for title, head in zip(over, self.heads[alone:])])


def cell(value: float | str | None, kind: str = "text", mark: str = "") -> Cell:
    """A value and its text."""
    return Cell(say(value, kind), value, mark)


def _fields(rows: Sequence[dict], fields: Sequence[tuple[str, str, str]], caption: str) -> Table:
    """One line per row; `fields` are (title, field of the summary, kind), and one that no row has is left out."""
    shown = [f for f in fields if any(row.get(f[1]) is not None for row in rows)]
    lines = [[cell(row.get(name), kind) for _, name, kind in shown] for row in rows]
    return Table(caption, tuple(title for title, _, _ in shown), lines)


def mark(run: Run, row: dict) -> str:
    """Grey where no difference to full was seen, red where the same budget spent at random does better."""
    if row["label"] == FULL:
        return BASE
    if not row["seen"]:
        return NOISE
    return BELOW if _standing(run, row) in ("below", "lower") else ""


def _standing(run: Run, row: dict) -> str:
    return run.beside[row["label"], row["budget"], row["task"]]["standing"]


def traits(run: Run, task: str) -> list[str]:
    """The labels that move a score more than methods do."""
    facts = run.summary["tasks"][task]
    aware = {True: "query-aware", False: "query-agnostic"}.get(facts.get("query_aware"))
    better = "lower is better" if facts["metric"] == "nll" else "higher is better"
    return [t for t in (aware, "one pass" if facts.get("one_pass") else None, better) if t]


def transfer(run: Run, only: Sequence[str] = ()) -> Table:
    """Methods down, tasks and budgets across: the paired difference to `full`, marked and signed; of full its score.

    only: these budgets
    """
    budgets = [b for b in dict.fromkeys(budget for _, budget, _ in run.beside) if not only or b in only]
    there = [label for label, budget, _ in run.beside if budget in budgets]
    out = [x["label"] for x in run.summary["left_out"] if set(x["budgets"]) & set(budgets)]
    parts = {x["label"]: (x["part"] or MISSING).replace("+", " + ") for x in run.summary["transfer"]}
    lines = [
        [cell(label), cell(parts.get(label)), *(_place(run, label, b, task) for task in run.compared for b in budgets)]
        for label in dict.fromkeys([*there, *out])
    ]
    heads = ("Method", "Part", *budgets * len(run.compared))
    groups = tuple((task, len(budgets)) for task in run.compared)
    return Table("Paired difference to full, with its interval; of full itself its score", heads, lines, groups)


def _place(run: Run, label: str, budget: str, task: str) -> Cell:
    """A figure, or in a word why there is none."""
    found = run.beside.get((label, budget, task))
    if label == FULL and found:
        row = next(r for r in run.rows if (r["label"], r["task"]) == (label, task))
        return Cell(interval(row, "mean"), row["diff"], BASE)
    if found:
        return _difference(run, found)
    out = any(x["label"] == label and budget in x["budgets"] for x in run.summary["left_out"])
    if out:
        return Cell("at 1" if (label, "1", task) in run.beside else "left out")
    if any((x["label"], x["budget"], x["task"]) == (label, budget, task) for x in run.summary["failed"]):
        return Cell("failed")
    idle = any((x["label"], x["task"]) == (label, task) for x in run.summary["not_exercised"])
    return Cell("no part in it") if idle and budget != "1" else cell(None)


def _difference(run: Run, row: dict) -> Cell:
    sign, about = SIGNS.get(_standing(run, row), ("", ""))
    chance = run.beside[row["label"], row["budget"], row["task"]]["random"]
    if sign and chance:
        about = f"{interval(chance)} to {chance['label']}: {about}"
    return Cell(interval(row), row["diff"], mark(run, row), sign, about)


ACHIEVED = {"cache": "kept_fraction", "decode": "decode_density", "prefill": "prefill_density"}


def kept(row: dict) -> float | None:
    """The share that was used of what the method's part may use: of the tokens stored, or of the pairs computed."""
    shares = [row.get(field) for part, field in ACHIEVED.items() if part in (row["part"] or "").split("+")]
    return next((share for share in shares if share is not None), None)


RESULT_HEADS = (
    "Method",
    "Budget",
    "Part",
    "Kept",
    "Bytes held",
    "Prefill",
    "Samples",
    "Score",
    "Difference to full",
    "Smallest visible",
)


def results(run: Run, task: str) -> Table:
    """Everything that was measured of one task."""
    title = run.summary["tasks"][task].get("title", task)
    return Table(title, RESULT_HEADS, [_result(run, row) for row in run.rows if row["task"] == task])


def _result(run: Run, row: dict) -> list[Cell]:
    return [
        cell(row["label"]),
        cell(row["budget"]),
        cell(row["part"]),
        cell(kept(row), "share"),
        cell(row.get("bytes_held"), "bytes"),
        cell(row.get("seconds_prefill"), "seconds"),
        cell(row["n"], "count"),
        Cell(interval(row, "mean"), row["mean"]),
        _difference(run, row),
        cell(row["smallest_effect"], "score"),
    ]


SPEED_FIELDS = (
    ("Method", "label", "text"),
    ("Budget", "budget", "text"),
    ("Tokens", "tokens", "count"),
    ("Prefill", "prefill_seconds", "seconds"),
    ("Prefill, spread", "prefill_spread", "seconds"),
    ("Prefill, as fast as full", "prefill_speedup", "times"),
    ("Per decoded token", "decode_seconds", "seconds"),
    ("Decode, spread", "decode_spread", "seconds"),
    ("Decode, as fast as full", "decode_speedup", "times"),
    ("Warm-up", "warmup_seconds", "seconds"),
    ("Cache", "bytes_held", "bytes"),
)
CLAIM_FIELDS = (
    ("Method", "name", "text"),
    ("Verdict", "verdict", "text"),
    ("Tier", "tier", "text"),
    ("Date", "date", "text"),
    ("Hardware", "hardware", "text"),
    ("Reason", "reason", "text"),
)


def speed(run: Run) -> Table:
    """Seconds and bytes against length."""
    return _fields(run.summary["speed"], SPEED_FIELDS, "Seconds and bytes against length")


def crossover(run: Run) -> Table:
    """From how many tokens on each method is faster than full attention, in prefill and in decode."""
    found = {(c["label"], c["budget"], c["stage"]): c["tokens"] for c in run.summary["crossover"]}
    lines = [
        [cell(label), cell(budget)] + [cell(found.get((label, budget, s)), "count") for s in ("prefill", "decode")]
        for label, budget in dict.fromkeys(key[:2] for key in found)
    ]
    caption = (
        "Tokens from which it is faster than full; –: not at the lengths measured, or it has no part in that stage"
    )
    return Table(caption, ("Method", "Budget", "Prefill from", "Decode from"), lines)


def absent(run: Run) -> Table:
    """What has no number, and why."""
    left = run.summary["left_out"]
    lines = [[out["label"], f"at {', '.join(out['budgets'])}", "; ".join(out["reasons"])] for out in left]
    lines += [
        [f"{out['label']} at {out['budget']}", out["task"], f"{out['type']}: {out['text']}"]
        for out in run.summary["failed"]
    ]
    lines += [
        [out["label"], out["task"], f"the task has nothing for its part to do: {out['part']}"]
        for out in run.summary["not_exercised"]
    ]
    return Table("What has no number, and why", ("Method", "Where", "Why"), [[cell(c) for c in line] for line in lines])


MAP_HEADS = ("Method", "Budget", "Queries", "Pairs chosen", "Exact mass on them", "Pairs, this head", "Mass, this head")


def maps(run: Run) -> Table:
    """What was chosen against where the exact mass lies, mean over all heads and in the one that is drawn."""
    assert run.maps is not None, "asked for only where there are maps"
    shares = ("density", "covered", "density_here", "covered_here")
    lines = [
        [cell(found["label"]), cell(found["budget"]), cell(STAGES[s["stage"]]), *(cell(s[x], "share") for x in shares)]
        for found in run.maps["pictures"]
        for s in found["stretches"]
    ]
    return Table("Chosen pairs, and exact mass on them", MAP_HEADS, lines)


POINT_HEADS = ("Method", "Budget", "Task", "Kept", "Bytes held", "Prefill", "Difference to full")


def points(run: Run) -> Table:
    """What the frontier is drawn from."""
    lines = [
        [cell(r["label"]), cell(r["budget"]), cell(r["task"]), cell(kept(r), "share")]
        + [cell(r.get("bytes_held"), "bytes"), cell(r.get("seconds_prefill"), "seconds"), _difference(run, r)]
        for r in run.rows
    ]
    return Table("One line a point", POINT_HEADS, lines)


def noise(run: Run) -> Table:
    """What differs when `full` is run twice."""
    lines = [[cell(task), cell(run.summary["noise"].get(task), "score")] for task in run.tasks]
    return Table("Noise: full run twice", ("Task", "Spread"), lines)


def claims(verdicts: Sequence[dict]) -> Table:
    """The verdict strip as a table."""
    return _fields(verdicts, CLAIM_FIELDS, "Do the papers' claims hold?")


def attended(found: Attended) -> Table:
    """Every head: pairs chosen, and exact mass on them. The head with the least of it on top."""
    heads = [(i, j) for i, maps in enumerate(found.stretches[0].layers) for j in range(len(maps.covered))]
    rows = []
    for i, j in sorted(heads, key=lambda at: float(found.stretches[0].layers[at[0]].covered[at[1]])):
        shares = [float(x[j]) for s in found.stretches for x in (s.layers[i].density, s.layers[i].covered)]
        rows.append([Cell(f"{i}.{j}", i + j / 1000), *(cell(share, "share") for share in shares)])
    titles = [f"{what}, {stage}" for stage in (s.stage for s in found.stretches) for what in ("pairs", "mass on them")]
    return Table("Every head, layer.head", ("head", *titles), rows)
