"""Who trains what: processes that share a folder, each started by itself, take the cells that no other one has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saccade.measure.store import Store
from saccade.measure.training import loop
from saccade.measure.training.loop import Work


class Turns:
    """A cell is trained by whoever comes first, and given back when that process ends, however it ends.

    The processes of one `accelerate launch` work on a cell together: to them no cell is another's.
    """

    def __init__(self) -> None:
        self._stores: dict[Path, Store] = {}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *exception: object) -> None:
        for store in self._stores.values():
            store.__exit__(*exception)

    def take(self, work: Work) -> dict[str, Any] | None:
        """The result of a cell, trained now where nobody has; None while another process is at it."""
        done = loop.finished(work)
        if done is None and self._mine(work):
            done = loop.finished(work) or loop.run(work)  # it may have been finished between the two
        return done

    def _mine(self, work: Work) -> bool:
        root = work.folder.parent.parent
        store = self._stores.setdefault(root, Store(root))
        return work.accelerator.num_processes > 1 or store.reserve(work.folder.name)
