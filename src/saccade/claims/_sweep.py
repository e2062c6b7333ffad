"""Many claims, here or on a cluster: each result is kept as soon as it is there, and a killed sweep resumes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saccade.claims import _found, run
from saccade.claims._contract import Progress as Within
from saccade.core.paths import cache_dir
from saccade.measure.environment import digest, sources
from saccade.measure.runner import Engine, Local, Progress, Queue, unwatched
from saccade.measure.store import Store

SECONDS = 120.0  # that a claim is taken to need before it has been measured once
FINISHED = "finished"


@dataclass(frozen=True)
class Measurement:
    """One claim at one tier, as this source measures it."""

    method: str
    tier: str
    sources: str
    vital = False
    alone = True  # many claims compare times

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits."""
        return digest([self.method, self.tier, self.sources])

    def head(self) -> dict[str, Any]:
        """The first fields of its line."""
        return {"key": self.key, "method": self.method, "tier": self.tier}

    def __str__(self) -> str:
        return f"claim of {self.method}"


@dataclass(frozen=True)
class About:
    """All that two workers must share: a result says itself what it was measured on."""

    mark: str


class Claimant:
    """Measures claims; `within` is told how far each is."""

    def __init__(self, within: Within | None = None):
        self.about, self.within = About(sources()), within

    def work(self, cell: Measurement) -> dict[str, Any]:
        """What is kept of a claim."""
        return {"found": run.measured(cell.method, cell.tier, self.within)}


def sweep(
    names: Sequence[str],
    tier: str,
    found: Callable[[dict[str, Any]], None],
    engine: Engine | None = None,
    progress: Progress | None = None,
    within: Within | None = None,
) -> None:
    """Measure the claims of these methods. One that cannot be measured stops no other, and neither does an exception.

    found: called in the order of the names, each time as soon as can be, with a line that holds `found` or an `error`
    engine: None: this process; progress: of the sweep; within: of each claim, in this process only

    Raises:
        BadOption: no such tier.
        CannotRun: nowhere to keep results.
    """
    run.check_tier(tier)
    _found.writable()
    cells = [Measurement(name, tier, sources()) for name in dict.fromkeys(names)]
    folder = cache_dir("sweeps", digest([cell.key for cell in cells]))
    if (folder / FINISHED).exists():  # whoever asks again after the end wants it measured again
        shutil.rmtree(folder)
    told, tell = _InOrder(cells, found), progress or unwatched
    with Store(folder) as store:

        def begin(about: About) -> Queue[Measurement]:
            queue = Queue(cells, store, _seconds, tell, lambda cell, line: told.add(_kept(line)))
            for cell in cells:
                if cell.key not in queue.left:
                    told.add(_left(store, cell))
            return queue

        make = Claimant if within is None else lambda: Claimant(within)
        (engine or Local()).run(make, begin, tell, "cuda" if tier == "gpu" else "cpu")
        for cell in cells:
            told.add(_left(store, cell))  # what other processes measured
    (folder / FINISHED).touch()


def _left(store: Store, cell: Measurement) -> dict[str, Any]:
    """A finished cell's line. Whoever still has the cell keeps it; one that was killed cannot, so it is kept here."""
    line = store.read(cell.key)
    assert line is not None, "it is finished"
    if store.reserve(cell.key):
        _kept(line)
        store.release(cell.key)
    return line


def _kept(line: Any) -> dict[str, Any]:
    """Among the results of its method, where it may be already: a sweep can be killed between the two."""
    if not line["error"] and line["found"] not in _found.lines(line["method"]):
        _found.append(line["found"])
    return line


def _seconds(cell: Measurement) -> float:
    """That it took the last time."""
    return max((x.get("seconds", 0.0) for x in _found.lines(cell.method) if x["tier"] == cell.tier), default=SECONDS)


class _InOrder:
    """Passes lines on in the order of their cells."""

    def __init__(self, cells: Sequence[Measurement], found: Callable[[dict[str, Any]], None]):
        self.waiting, self.found = [cell.key for cell in cells], found
        self.lines: dict[str, Any] = {}

    def add(self, line: Any) -> None:
        self.lines[line["key"]] = line
        while self.waiting and self.waiting[0] in self.lines:
            self.found(self.lines[self.waiting.pop(0)])
