"""The tables of a report, as text that every format shows alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saccade.report.run import Run
from saccade.report.words import interval, say

# marks of a cell: grey, red, or none of them
NOISE, BELOW, BASE = "noise", "below", "base"


@dataclass(frozen=True)
class Cell:
    """Text, the value to sort by, and a mark ("noise", "below", "base" or "")."""

    text: str
    value: float | str | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """What a figure was drawn from, or what is read by itself."""

    caption: str
    heads: tuple[str, ...]
    rows: list[list[Cell]]


def cell(value: float | str | None, kind: str = "text", mark: str = "") -> Cell:
    """A value and its text."""
    return Cell(say(value, kind), value, mark)


def _fields(rows: Sequence[dict], fields: Sequence[tuple[str, str, str]], caption: str) -> Table:
    """One line per row; `fields` are (title, field of the summary, kind), and one that no row has is left out."""
    shown = [f for f in fields if any(row.get(f[1]) is not None for row in rows)]
    lines = [[cell(row.get(name), kind) for _, name, kind in shown] for row in rows]
    return Table(caption, tuple(title for title, _, _ in shown), lines)


def mark(run: Run, row: dict) -> str:
    """Grey where no difference was seen, red where the same budget spent at random does better."""
    if row["method"] == "full":
        return BASE
    if not row["seen"]:
        return NOISE
    return BELOW if _below_random(run, row) else ""


def _below_random(run: Run, row: dict) -> bool:
    """Against the random choice in the same part of the model's work."""
    chance = [r for r in run.rows if r["method"] == "random" and r["part"] in row["part"].split("+")]
    means = [r["mean"] for r in chance if all(r[f] == row[f] for f in ("task", "budget"))]
    lower = run.summary["tasks"][row["task"]]["metric"] == "nll"
    return any(row["mean"] > mean if lower else row["mean"] < mean for mean in means)


def traits(run: Run, task: str) -> list[str]:
    """The labels that move a score more than methods do."""
    facts = run.summary["tasks"][task]
    aware = {True: "query-aware", False: "query-agnostic"}.get(facts.get("query_aware"))
    better = "lower is better" if facts["metric"] == "nll" else "higher is better"
    return [t for t in (aware, "one pass" if facts.get("one_pass") else None, better) if t]


def overview(run: Run) -> Table:
    """Method and budget down, tasks across: the paired difference to `full`, marked."""
    found = {(row["label"], row["budget"], row["task"]): row for row in run.rows if row["method"] != "full"}
    lines = [
        [cell(label), cell(budget)] + [_difference(run, found.get((label, budget, task))) for task in run.compared]
        for label, budget in dict.fromkeys(key[:2] for key in found)
    ]
    return Table("Paired difference to full, with its interval", ("Method", "Budget", *run.compared), lines)


def _difference(run: Run, row: dict | None) -> Cell:
    return Cell(interval(row), row.get("diff"), mark(run, row)) if row else cell(None)


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
        Cell(interval(row), row["diff"], mark(run, row)),
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
    lines = [[out["label"], "everywhere", "; ".join(out["reasons"])] for out in run.summary["left_out"]]
    lines += [
        [f"{out['label']} at {out['budget']}", out["task"], f"{out['type']}: {out['text']}"]
        for out in run.summary["failed"]
    ]
    lines += [
        [out["label"], out["task"], f"the task has nothing for its part to do: {out['part']}"]
        for out in run.summary["not_exercised"]
    ]
    return Table("What has no number, and why", ("Method", "Where", "Why"), [[cell(c) for c in line] for line in lines])


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
