"""What claims say of the methods of a run: the last line that each left."""

from __future__ import annotations

import json
from pathlib import Path

from saccade.core.errors import CorruptResult
from saccade.core.paths import cache_dir
from saccade.report.run import Run

SHIPPED = Path(__file__).parent.parent / "claims" / "found"


def verdicts(run: Run) -> list[dict]:
    """One line per method that has something to claim; "not attempted" where nothing was measured."""
    names = [name for name, card in run.cards().items() if not (card and card.baseline)]
    return [last(name) or {"name": name, "verdict": "not attempted"} for name in names]


def last(name: str) -> dict | None:
    """The newest line of a method, shipped or measured here; None where there is none."""
    files = [folder / f"{name.replace('-', '_')}.jsonl" for folder in (SHIPPED, cache_dir("claims"))]
    lines = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines() if line]
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as e:
        raise CorruptResult(
            f"the claims of {name}", f"a line is no JSON ({e})", f"Measure again: saccade claim {name}"
        ) from e
    return {"name": name} | max(found, key=lambda line: line["date"]) if found else None
