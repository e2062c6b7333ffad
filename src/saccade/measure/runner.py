"""Sweeps: cells are worked on one by one, here or elsewhere; each is on disk at once, and a killed sweep resumes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Generic, Literal, Protocol, TypeVar

from saccade.measure.store import Store

log = logging.getLogger("saccade")

POLL_SECONDS = 0.5  # how often is looked whether another process has finished its cell


@dataclass(frozen=True)
class Event:
    """What `progress` is called with. `done` of `total` cells; `seconds_left` once there is something to go by."""

    kind: Literal["note", "start", "cell", "end"]
    text: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None


class Piece(Protocol):
    """A unit of work: what determines its result is in its key. In words (`str`) it is what progress shows.

    vital: without it the others are worth nothing: an exception in it ends the sweep
    alone: it is timed, so nothing else may run on the same processor meanwhile
    """

    key: str
    vital: bool
    alone: bool

    def head(self) -> dict[str, Any]:
        """The first fields of its line."""


P = TypeVar("P", bound=Piece)
Progress = Callable[[Event], None]
Work = Callable[[P], dict[str, Any]]


def unwatched(event: Event) -> None:
    """Nobody is watching."""


def finished(line: dict[str, Any] | None) -> bool:
    """Whether a cell is done. One that failed, or in which a timing failed, is tried again by the next sweep."""
    return line is not None and not line["error"] and not any(m["error"] for m in line.get("measures", ()))


class Queue(Generic[P]):
    """What is left of a sweep. Every process that works in the same folder takes from it and puts back into it.

    weigh: how much work a cell is, in any unit; only the time left depends on it
    then: called with a cell and its line when it is on disk
    """

    def __init__(
        self,
        cells: Sequence[P],
        store: Store,
        weigh: Callable[[P], float],
        progress: Progress,
        then: Callable[[P, dict[str, Any]], None] | None = None,
    ):
        self.store, self.weigh, self.progress, self.then = store, weigh, progress, then
        # before they are read: what another process finishes between the two has another stamp by the time it is taken
        self._before = {cell.key: store.stamp(cell.key) for cell in cells}
        self.left = {cell.key: cell for cell in cells if not finished(store.read(cell.key))}
        self.total, self.begun, self.spent = len(cells), time.monotonic(), 0.0
        self._ahead = sum(map(weigh, self.left.values()))
        self._mine: set[str] = set()
        if self.done:
            progress(Event("note", f"{self.done} of {self.total} cells are finished already", self.done, self.total))

    @property
    def done(self) -> int:
        """Cells that are finished, as far as this process has seen."""
        return self.total - len(self.left)

    @property
    def over(self) -> bool:
        """Nothing is left, here or in another process."""
        return not self.left

    def take(self, fits: Callable[[P], bool] = lambda cell: True) -> P | None:
        """The first that fits, reserved. None: this process and others have all that are left."""
        for key, cell in list(self.left.items()):
            if key in self._mine or not fits(cell) or not self.store.reserve(key):
                continue
            if self.store.stamp(key) == self._before[key]:
                self._mine.add(key)
                rate = (time.monotonic() - self.begun) / self.spent if self.spent else None
                seconds_left = rate and rate * self._ahead
                self.progress(Event("start", str(cell), self.done, self.total, seconds_left))
                return cell
            self.store.release(key)  # another process has finished it
            self._strike(cell)
        return None

    def put(self, cell: P, line: dict[str, Any]) -> None:
        """Finished."""
        self.store.write(line)
        if self.then:
            self.then(cell, line)
        self.back(cell)
        self._strike(cell)
        failed = line["error"] and f" failed: {line['error']['type']}"
        self.progress(Event("cell", f"{cell}{failed or ''}", self.done, self.total))

    def back(self, cell: P) -> None:
        """Not finished, for whoever takes it next."""
        self._mine.discard(cell.key)
        self.store.release(cell.key)

    def _strike(self, cell: P) -> None:
        del self.left[cell.key]
        self.spent += self.weigh(cell)
        self._ahead -= self.weigh(cell)

    def note(self, text: str) -> None:
        """Tell what is no progress."""
        self.progress(Event("note", text, self.done, self.total))


# --- where it runs ----------------------------------------------------------------------------------------------------


class Worker(Protocol):
    """What stands ready to work on cells: a loaded model, say.

    about: what it says of itself, for who begins the sweep; `about.mark` is the same for all workers whose results may
    stand beside one another
    """

    about: Any

    def work(self, cell: Any) -> dict[str, Any]:
        """The measured part of a cell's line."""


class Engine(Protocol):
    """Where a sweep runs."""

    def run(self, make: Callable[[], Worker], begin: Callable[[Any], Queue], progress: Progress, device: str) -> None:
        """Make workers, and let them empty the queue that `begin` makes of what the first of them says of itself."""


class Local:
    """One worker, in this process."""

    def run(self, make: Callable[[], Worker], begin: Callable[[Any], Queue], progress: Progress, device: str) -> None:
        """Cells in their order, but for those that another process has."""
        worker = make()
        queue, waiting = begin(worker.about), False
        while not queue.over:
            cell = queue.take()
            if cell is not None:
                queue.put(cell, line_of(cell, worker.work))
            elif not queue.over:
                if not waiting:
                    queue.note(f"waiting for {len(queue.left)} cells that other processes work on")
                waiting = True
                time.sleep(POLL_SECONDS)


def line_of(cell: P, work: Work[P]) -> dict[str, Any]:
    """Work on a cell. Its exception becomes its `error`, unless it is vital; Ctrl-C passes through."""
    started, clock = datetime.now(timezone.utc), time.monotonic()
    measured, error = {}, None
    try:
        measured = work(cell)
    except Exception as e:  # whatever a method raises is a result of this comparison, and is shown as one
        if cell.vital:
            raise
        log.warning("%s failed", cell, exc_info=True)
        error = {"type": type(e).__name__, "text": str(e)}
    times = {"started": started.isoformat(timespec="seconds"), "seconds": round(time.monotonic() - clock, 3)}
    return {**cell.head(), **measured, "error": error, **times}


def failed_line(cell: Piece, kind: str, text: str) -> dict[str, Any]:
    """Of a cell that could not even raise an exception."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**cell.head(), "error": {"type": kind, "text": text}, "started": started, "seconds": 0.0}
