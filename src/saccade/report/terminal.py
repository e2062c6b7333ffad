"""The report for a terminal: the transfer table and the verdicts, without colour where there is no terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saccade.report import tables
from saccade.report.heads import Heads
from saccade.report.run import Run
from saccade.report.verdicts import verdicts

STYLES = {tables.NOISE: "dim", tables.BELOW: "bold red", tables.BASE: "dim"}
WIDTH_CHARS = 200
BEST = 20  # heads that a terminal shows


def render(run: Run) -> str:
    """The transfer table, the verdicts and the crossover as text, in colour only where stdout is a terminal."""
    shown = [tables.transfer(run), tables.crossover(run), tables.claims(verdicts(run)), tables.absent(run)]
    key = ["dim: not to be told from full; red: seen, and worse than the same budget at random"]
    return _printed(shown, "\n".join([*key, *(f"{sign}: {words}" for sign, words in tables.SIGNS.values())]))


def render_heads(heads: Heads) -> str:
    """The best heads of an artefact, and how many more there are."""
    whole = heads.table()
    best = tables.Table(f"{heads.artefact.method} of {heads.artefact.model}", whole.heads, whole.rows[:BEST])
    return _printed([best], f"the first {len(best.rows)} of {len(whole.rows)} heads, layer.head")


def _printed(shown: Sequence[tables.Table], note: str) -> str:
    colour = sys.stdout.isatty()
    console = Console(
        file=io.StringIO(), force_terminal=colour, no_color=not colour, width=None if colour else WIDTH_CHARS
    )
    for t in shown:
        if t.rows:
            console.print(table(t))
    console.print(note)
    return console.file.getvalue()  # type: ignore[attr-defined]


def table(t: tables.Table) -> Table:
    """One table for rich."""
    # many columns of figures: no lines between them, and each interval under its figure
    close = {"box": SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)} if t.groups else {}
    made = Table(title=t.caption, title_justify="left", header_style="bold", **close)
    for i, head in enumerate(t.titles):
        words = head.replace(", ", "\n") if t.groups else head
        made.add_column(Text(words), justify="right" if i else "left", no_wrap=i == 0, overflow="fold")
    for row in t.rows:
        made.add_row(*[Text(_stacked(c) if t.groups else c.signed, style=STYLES.get(c.mark, "")) for c in row])
    return made


def _stacked(c: tables.Cell) -> str:
    """Figure and sign, and under them the interval."""
    middle, bracket, ends = c.text.partition(" [")
    return f"{middle} {c.sign}".strip() + (f"\n[{ends}" if bracket else "")
