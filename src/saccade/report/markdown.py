"""The report as Markdown: tables to paste."""

from __future__ import annotations

from saccade.report import tables
from saccade.report.heads import Heads
from saccade.report.run import Run
from saccade.report.verdicts import verdicts

MARKS = {tables.NOISE: "_{}_", tables.BELOW: "**{}**"}
_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " "})


def render(run: Run) -> str:
    """The whole report as Markdown."""
    parts = [
        f"# saccade: {_safe(str(run.summary['model']))}",
        "## Methods, budgets, tasks",
        key(),
        table(tables.transfer(run)),
    ]
    for task in run.tasks:
        parts += [f"## {_safe(task)}: {', '.join(tables.traits(run, task))}", table(tables.results(run, task))]
    parts += ["## Claims", table(tables.claims(verdicts(run)))]
    for found in (tables.speed(run), tables.crossover(run), tables.noise(run), tables.absent(run)):
        parts += [f"## {found.caption}", table(found)] if found.rows else []
    parts += ["## How to repeat it", *map(_safe, run.summary["repeat"])]
    return "\n\n".join(parts) + "\n"


def key() -> str:
    """What the looks and signs of a cell say."""
    looks = ["_In italics_: not to be told from `full`", "**bold**: seen, and worse than the same budget at random"]
    return "; ".join([*looks, *(f"{sign}: {words}" for sign, words in tables.SIGNS.values())]) + "."


def render_heads(heads: Heads) -> str:
    """What an artefact says of each head, as Markdown."""
    made = heads.artefact
    facts = "\n".join(f"- {_safe(name)}: {_safe(value)}" for name, value in heads.facts())
    return f"# saccade: heads of {_safe(made.model)}, by {_safe(made.method)}\n\n{facts}\n\n{table(heads.table())}\n"


def table(t: tables.Table) -> str:
    """One table in GitHub's Markdown."""
    lines = [list(t.titles), ["---", *["---:"] * (len(t.heads) - 1)]]
    lines += [[_cell(c) for c in row] for row in t.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _safe(text: str) -> str:
    return text.translate(_SPECIAL)


def _cell(c: tables.Cell) -> str:
    return f"{MARKS.get(c.mark, '{}').format(_safe(c.text))} {c.sign}".strip()
