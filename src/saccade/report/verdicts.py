"""What claims say of the methods of a run: the last line that each left."""

from __future__ import annotations

from saccade.claims._found import latest
from saccade.report.run import Run


def verdicts(run: Run) -> list[dict]:
    """One line per method that has something to claim; "not attempted" where nothing was measured."""
    names = [name for name, card in run.cards().items() if not (card and card.baseline)]
    return [{"name": name, **(latest(name) or {"verdict": "not attempted"})} for name in names]
