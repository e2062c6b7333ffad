"""How verbs speak: data to stdout as JSON or a table, notes and progress to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.measure.runner import Event

WIDTH_CHARS = 200  # of tables that go to a file or a pipe
EVERY_SECONDS = 10.0  # where stderr is no terminal, progress is a line so often


def note(text: str) -> None:
    """A line for the reader, not for the next program."""
    print(text, file=sys.stderr, flush=True)


def say_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def say_table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table on stdout, coloured and fitted to its width only where that is a terminal. `right`: heads of numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, head in enumerate(heads):
        made.add_column(Text(head), justify="right" if head in right else "left", no_wrap=i == 0)
    for row in rows:
        made.add_row(*[Text(cell, style=STYLES.get(cell, "")) for cell in row])
    console = Console(width=None if sys.stdout.isatty() else WIDTH_CHARS)
    with console.capture() as drawn:
        console.print(made)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


STYLES = {
    "reproduced": "green",
    "in part": "yellow",
    "unclear": "yellow",
    "not reproduced": "red",
    "held": "green",
    "not held": "red",
    "ok": "green",
    "todo": "yellow",
    "warn": "yellow",
    "fail": "bold red",
    "no": "red",
}


class Bar:
    """Progress on stderr: a bar on a terminal, else a line now and then, nothing where quiet.

    Called with (done, total, text), or by `event` with what `compare` reports.
    """

    def __init__(self, quiet: bool = False):
        self.quiet, self.live, self.last = quiet, not quiet and sys.stderr.isatty(), 0.0

    def __enter__(self) -> Bar:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
            self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.progress.add_task("", total=None, visible=False)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.progress.stop()

    def __call__(self, done: int, total: int, text: str) -> None:
        if self.live:
            self.progress.update(self.task, completed=done, total=total, description=text, visible=True)
        elif not self.quiet and time.monotonic() - self.last >= EVERY_SECONDS:
            self.last = time.monotonic()
            note(f"{done}/{total} {text}")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While data is printed, which a live bar would take to stderr."""
        if self.live:
            self.progress.stop()
        yield
        if self.live:
            self.progress.start()

    def event(self, event: Event) -> None:
        """What `saccade.compare(progress=...)` calls."""
        if event.kind == "note" and self.live:
            self.progress.console.print(event.text, markup=False, highlight=False)
        elif event.kind == "note" and not self.quiet:
            note(event.text)
        elif event.kind in ("start", "cell"):
            left = "" if event.seconds_left is None else f", {duration(event.seconds_left)} left"
            self(event.done, event.total, event.text + left)


def duration(seconds: float) -> str:
    """About how long: "40 s", "4 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
