"""What measurements left: one line of JSON each, in `found/NAME.jsonl`. Torch-free, for pages and the command line."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from saccade.core.errors import CannotRun
from saccade.core.paths import cache_dir

log = logging.getLogger("saccade")

SHIPPED = Path(__file__).parent / "found"
CHECKOUT = Path(__file__).parents[3]
NEEDED = {"method", "tier", "verdict", "date"}


def folder() -> Path:
    """Where new lines go: beside the claims in a source checkout that can be written, else the cache."""
    there = SHIPPED if SHIPPED.is_dir() else SHIPPED.parent
    ours = (CHECKOUT / "pyproject.toml").is_file() and os.access(there, os.W_OK)
    return SHIPPED if ours else cache_dir("claims")


def writable() -> None:
    """Make sure that a line can be kept, before minutes are spent on it.

    Raises:
        CannotRun: neither the checkout nor the cache can be written.
    """
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _unkept(place, e.strerror) from e
    if not os.access(place, os.W_OK):
        raise _unkept(place, "it is read-only")


def append(line: dict[str, Any]) -> Path:
    """Add a result; what is there already stays as it is, a half-written last line too.

    Raises:
        CannotRun: the folder cannot be written, or is full.
    """
    file = folder() / _file(line["method"])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torn = file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n")
        with file.open("a", encoding="utf-8") as out:
            out.write("\n" * torn + json.dumps(line, allow_nan=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
    except OSError as e:
        raise _unkept(file.parent, e.strerror) from e
    return file


def lines(name: str, shipped: bool = False) -> list[dict[str, Any]]:
    """All results of a method: those shipped, and unless only these are asked for those in the cache. A line that
    cannot be read is skipped with a warning."""
    out = []
    for file in (SHIPPED / _file(name), *([] if shipped else [cache_dir("claims", _file(name))])):
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        for number, text in enumerate(texts, 1):
            try:
                out.append(_read(text))
            except ValueError as e:
                log.warning("%s, line %d is skipped: %s", file, number, e)
    return out


def latest(name: str) -> dict[str, Any] | None:
    """The newest result of a method; the smoke tier counts only where there is no other. None: never measured."""
    return max(lines(name), key=lambda line: (line["tier"] != "smoke", line["date"]), default=None)


def _read(text: str) -> dict[str, Any]:
    line = json.loads(text)
    missing = sorted(NEEDED - set(line)) if isinstance(line, dict) else sorted(NEEDED)
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return line


def _file(name: str) -> str:
    return f"{name.replace('-', '_')}.jsonl"


def _unkept(place: Path, why: str | None) -> CannotRun:
    do = "Make it writable, or name another with SACCADE_CACHE."
    return CannotRun("keep what a claim finds", f"{place} cannot be written ({why})", do)
