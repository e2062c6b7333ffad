"""The report for a terminal: the overview and the verdicts, without colour where there is no terminal."""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saccade.report import tables
from saccade.report.run import Run
from saccade.report.verdicts import verdicts

STYLES = {tables.NOISE: "dim", tables.BELOW: "bold red", tables.BASE: "dim"}
WIDTH_CHARS = 200


def render(run: Run) -> str:
    """The overview, the verdicts and the crossover as text, in colour only where stdout is a terminal."""
    shown = [tables.overview(run), tables.crossover(run), tables.claims(verdicts(run)), tables.absent(run)]
    colour = sys.stdout.isatty()
    console = Console(
        file=io.StringIO(), force_terminal=colour, no_color=not colour, width=None if colour else WIDTH_CHARS
    )
    for t in shown:
        if t.rows:
            console.print(table(t))
    console.print("dim: not to be told from full; red: worse than the same budget at random")
    return console.file.getvalue()  # type: ignore[attr-defined]


def table(t: tables.Table) -> Table:
    """One table for rich."""
    made = Table(title=t.caption, title_justify="left", header_style="bold")
    for i, head in enumerate(t.heads):
        made.add_column(Text(head), justify="right" if i else "left", no_wrap=i == 0)
    for row in t.rows:
        made.add_row(*[Text(c.text, style=STYLES.get(c.mark, "")) for c in row])
    return made
