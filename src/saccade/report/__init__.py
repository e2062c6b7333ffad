"""A run, as one HTML file, as Markdown to paste, or as a table for the terminal. The report computes no number."""

from __future__ import annotations

from pathlib import Path

from saccade.core.errors import BadOption
from saccade.report import html, markdown, terminal
from saccade.report.run import Run

FORMATS = {
    "html": (html.render, "report.html"),
    "markdown": (markdown.render, "report.md"),
    "terminal": (terminal.render, ""),
}


def report(run_dir: str | Path, out: str | Path | None = None, format: str = "html") -> Path | str:
    """Show a finished run: what it cost in quality, time and bytes to look at less.

    `html` and `markdown` are written to `out` (or into the run directory) and the path comes back;
    `terminal` comes back as text, and is written only where `out` says.

    Raises:
        BadOption: a format that is none of these.
        BadInput: the directory holds no finished run.
        CorruptResult: a file of the run cannot be read.
    """
    if format not in FORMATS:
        raise BadOption(f"report(format={format!r})", "no such format", f"Give one of: {', '.join(FORMATS)}.")
    render, file_name = FORMATS[format]
    text = render(Run.read(run_dir))
    if out is None and not file_name:
        return text
    path = Path(out) if out is not None else Path(run_dir) / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
