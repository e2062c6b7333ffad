"""Run cells one after the other; each result is on disk before the next begins, and a killed run resumes."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from saccade.core.errors import CannotRun, CorruptResult
from saccade.measure.cells import FULL, Cell

log = logging.getLogger("saccade")


@dataclass(frozen=True)
class Event:
    """What `progress` is called with. `done` of `total` cells; `seconds_left` once there is something to go by."""

    kind: Literal["note", "start", "cell", "end"]
    text: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None


Progress = Callable[[Event], None]
Work = Callable[[Cell], dict[str, Any]]


class Results:
    """The lines of a cells.jsonl by key. The last line of a key counts; lines are only ever appended.

    A last line without its end is what a killed process leaves: it is cut off, and `notice` says so.

    Raises:
        CorruptResult: any other line that is no result; file and line are named and nothing is touched.
    """

    def __init__(self, path: Path):
        self.path, self.notice = path, ""
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.lines = {line["key"]: line for line in map(self._read, enumerate(whole.splitlines(), 1))}
        if len(whole) < len(data):
            self._cut(len(whole), len(data) - len(whole))

    def _read(self, numbered: tuple[int, bytes]) -> dict[str, Any]:
        number, text = numbered
        try:
            line = json.loads(text)
            if isinstance(line.get("key"), str):
                return line
            problem = "it holds no key"
        except (ValueError, AttributeError) as e:
            problem = f"it is no JSON object ({e})"
        raise CorruptResult(
            f"{self.path}, line {number}",
            f"{problem}: {text[:60].decode(errors='replace')!r}",
            f"Delete line {number} of {self.path.name} and start again: its cell is computed anew, the rest is kept.",
        )

    def _cut(self, size: int, torn: int) -> None:
        self.notice = f"{self.path.name} ended in {torn} bytes of an unfinished line; they were cut off"
        log.warning(self.notice)
        with open(self.path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished. One that failed, or in which a timing failed, is tried again."""
        line = self.lines.get(cell.key)
        return line is not None and not line["error"] and not any(m["error"] for m in line.get("measures", ()))

    def append(self, line: dict[str, Any]) -> None:
        """Put a line on disk, and only then into memory.

        Raises:
            CannotRun: it cannot be written; what is there stays good.
        """
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            asked = f"write {len(data):,} bytes to {self.path}"
            raise CannotRun(asked, str(e.strerror), "Mend that and start again: finished cells are kept.") from e
        self.lines[line["key"]] = line


def run_cells(cells: Sequence[Cell], work: Work, results: Results, weigh: Callable[[Cell], float], progress: Progress):
    """Do what is not done yet. `weigh` says how much work a cell is, in any unit; only the time left depends on it.

    An exception inside a cell becomes the cell's `error`, but for `full`: without it nothing can be compared. That and
    Ctrl-C pass through, and what was finished is kept.
    """
    left = [cell for cell in cells if not results.has(cell)]
    total, begun, spent = len(cells), time.monotonic(), 0.0
    if len(left) < total:
        progress(Event("note", f"{total - len(left)} of {total} cells are finished already", total - len(left), total))
    ahead = sum(map(weigh, left))
    for number, cell in enumerate(left, total - len(left)):
        rate = (time.monotonic() - begun) / spent if spent else None
        progress(Event("start", str(cell), number, total, rate and rate * (ahead - spent)))
        line = _one(cell, work)
        results.append(line)
        spent += weigh(cell)
        failed = line["error"] and f" failed: {line['error']['type']}"
        progress(Event("cell", f"{cell}{failed or ''}", number + 1, total))


def _one(cell: Cell, work: Work) -> dict[str, Any]:
    started, clock = datetime.now(timezone.utc), time.monotonic()
    measured, error = {}, None
    try:
        measured = work(cell)
    except Exception as e:  # whatever a method raises is a result of this comparison, and is shown as one
        if cell.label == FULL:
            raise
        log.warning("%s failed", cell, exc_info=True)
        error = {"type": type(e).__name__, "text": str(e)}
    times = {"started": started.isoformat(timespec="seconds"), "seconds": round(time.monotonic() - clock, 3)}
    return {**cell.head(), **measured, "error": error, **times}


def write_json(path: Path, value: Any) -> None:
    """Replace a file in one step, so that it is whole or the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
