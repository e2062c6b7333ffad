"""A run, or an artefact's heads, as one HTML file, as Markdown to paste, or as a table for the terminal.

The report computes no number.
"""

from __future__ import annotations

from pathlib import Path

from saccade.core.errors import BadOption
from saccade.report import html, markdown, terminal
from saccade.report.heads import SUFFIXES, Heads
from saccade.report.run import Run

FORMATS = {
    "html": (html.render, html.render_heads, ".html"),
    "markdown": (markdown.render, markdown.render_heads, ".md"),
    "terminal": (terminal.render, terminal.render_heads, ""),
}


def report(run_dir: str | Path, out: str | Path | None = None, format: str = "html") -> Path | str:
    """Show a finished run: what it cost in quality, time and bytes to look at less. Or an artefact: its heads.

    run_dir: the folder of a run, or the file of an artefact that `calibrate` made

    `html` and `markdown` are written to `out` (or into the run directory; of an artefact, into the current one) and the
    path comes back; `terminal` comes back as text, and is written only where `out` says.

    Raises:
        BadOption: a format that is none of these.
        BadInput: the directory holds no finished run, or the artefact nothing per head.
        CorruptResult, BadArtefact: a file cannot be read.
    """
    if format not in FORMATS:
        raise BadOption(f"report(format={format!r})", "no such format", f"Give one of: {', '.join(FORMATS)}.")
    render, render_heads, suffix = FORMATS[format]
    if Path(run_dir).suffix in SUFFIXES:
        heads = Heads.read(run_dir)
        text, usual = render_heads(heads), Path(f"{heads.artefact.method}-{heads.artefact.fingerprint}{suffix}")
    else:
        text, usual = render(Run.read(run_dir)), Path(run_dir) / f"report{suffix}"
    if out is None and not suffix:
        return text
    path = Path(out) if out is not None else usual
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
