"""A run directory, read: what `saccade compare` left, and what claims say of its methods."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.core import registry
from saccade.core.card import Card
from saccade.core.errors import BadInput, CorruptResult
from saccade.measure.store import Store

SUMMARY_PARTS = (
    "model",
    "tasks",
    "noise",
    "rows",
    "transfer",
    "not_exercised",
    "left_out",
    "failed",
    "missing",
    "speed",
    "crossover",
    "breaks",
    "repeat",
)
MAPS = "maps.json"
AGAIN = "Start the run again: finished cells are kept."


@dataclass(frozen=True)
class Run:
    """A run. `summary` holds all numbers that are shown; `cells` and `maps` only pictures and the shares beside them.

    maps: of `saccade report --pictures`, None where it was not asked for
    """

    run: Mapping[str, Any]
    env: Mapping[str, Any]
    cells: list[dict]
    summary: Mapping[str, Any]
    maps: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a finished run.

        Raises:
            BadInput: there is no run in the folder, or it has not been finished.
            CorruptResult: a file is not what `saccade compare` writes.
        """
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise BadInput(f"a report on {folder}", _no_run(folder), "Make a run: saccade compare --out DIR")
        if not (folder / "summary.json").is_file():
            raise BadInput(f"a report on {folder}", "it has no summary.json: the run is not finished", AGAIN)
        run, env, summary = (_load(folder / f"{name}.json") for name in ("run", "env", "summary"))
        missing = [part for part in SUMMARY_PARTS if part not in summary]
        if missing:
            raise CorruptResult(f"{folder / 'summary.json'}", f"it lacks {', '.join(missing)}", AGAIN)
        store, maps = Store(folder), folder / MAPS
        cells = [line for key in run["cells"] if (line := store.read(key))]
        return cls(run, env, cells, summary, _load(maps) if maps.is_file() else None)

    @property
    def rows(self) -> list[dict]:
        """One per method, budget and task."""
        return self.summary["rows"]

    @functools.cached_property
    def beside(self) -> dict[tuple[str, str, str], dict]:
        """(label, budget, task) -> the cell of the transfer table: how it stands to `full` and to chance."""
        return {(x["label"], x["budget"], x["task"]): x for x in self.summary["transfer"]}

    @property
    def labels(self) -> list[str]:
        """What was compared, in the order of the summary."""
        return list(dict.fromkeys(row["label"] for row in self.rows))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the summary."""
        return list(dict.fromkeys(row["task"] for row in self.rows))

    @property
    def compared(self) -> list[str]:
        """Tasks that had something to do for more than `full`."""
        return list(dict.fromkeys(row["task"] for row in self.rows if row["method"] != "full"))

    @property
    def methods(self) -> list[str]:
        """Registry names of all that took part; what composes is taken apart."""
        return list(dict.fromkeys(name for row in self.rows for name in row["method"].split("+")))

    def cards(self) -> dict[str, Card | None]:
        """name -> card; None for a method that this machine does not have."""
        here = set(registry.list_methods())
        return {name: registry.card(name) if name in here else None for name in self.methods}


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(p.name for p in folder.iterdir())
    return f"it holds no run.json, but {', '.join(names[:5]) or 'nothing'}"


def _load(file: Path) -> Any:
    if not file.is_file():
        raise CorruptResult(str(file), "it is missing", AGAIN)
    return _json(file.read_text(encoding="utf-8"), str(file))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise CorruptResult(where, f"it is no JSON ({e})", AGAIN) from e
