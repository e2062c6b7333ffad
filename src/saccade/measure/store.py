"""Results on disk: one file per cell, whole or not there, in a folder that processes may share. Torch-free."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from saccade.core.errors import CannotRun, CorruptResult

try:
    import fcntl
except ImportError:  # Windows has none: there only one process may work in a folder
    fcntl = None

log = logging.getLogger("saccade")

CELLS = "cells"
EARLIER = "cells.jsonl"  # where all cells were once kept, a line each
BUSY = (errno.EACCES, errno.EAGAIN)


class Store:
    """The cells of a folder: `cells/KEY.json`, a line of JSON each. What is read is what is there now.

    A cell can be reserved, until the store is left. The system keeps that, byte for byte of one empty file, and forgets
    it when the process ends, however it ends; so no process waits for a dead one.

    Raises:
        CorruptResult: a file that is no result; it is named, and nothing is touched.
    """

    def __init__(self, folder: Path):
        self.root, self.folder = folder, folder / CELLS
        self._earlier = _lines(folder / EARLIER)
        self._locks: Any = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        """Give back all that is reserved: closing the file does."""
        if self._locks is not None:
            self._locks.close()
            self._locks = None

    def path(self, key: str) -> Path:
        """Where a cell is kept."""
        return self.folder / f"{key}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """A cell's line; None where there is none."""
        path = self.path(key)
        try:
            return _result(path.read_bytes(), str(path), f"Delete {path.name}")
        except FileNotFoundError:
            return self._earlier.get(key)

    def stamp(self, key: str) -> tuple[int, int] | None:
        """Another one once the cell has been written anew."""
        try:
            found = os.stat(self.path(key))
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def write(self, line: dict[str, Any]) -> None:
        """Put a cell on disk.

        Raises:
            CannotRun: it cannot be written; what is there stays good.
        """
        write_whole(self.path(line["key"]), json.dumps(line, allow_nan=False) + "\n")

    def reserve(self, key: str) -> bool:
        """For this process alone; False where another one has it."""
        if fcntl is None:
            return True
        if self._locks is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = open(self.folder / ".locks", "ab")  # noqa: SIM115  until it is left
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(key))
        except OSError as e:
            if e.errno in BUSY:
                return False
            log.warning("%s cannot be locked (%s): let no other process work in it meanwhile", self.folder, e.strerror)
        return True

    def release(self, key: str) -> None:
        """For others to take."""
        if self._locks is not None:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, _place(key))


def _place(key: str) -> int:
    """The byte that stands for a cell."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """Of an earlier run; of two lines with one key the last counts, a last line without its end does not."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    numbered = enumerate(whole.splitlines(), 1)
    lines = [_result(text, f"{path}, line {i}", f"Delete line {i} of {path.name}") for i, text in numbered]
    return {line["key"]: line for line in lines}


def _result(text: bytes, where: str, do: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        if isinstance(line.get("key"), str):
            return line
        problem = "it holds no key"
    except (ValueError, AttributeError) as e:
        problem = f"it is no JSON object ({e})"
    found = f"{problem}: {text[:60].decode(errors='replace')!r}"
    raise CorruptResult(where, found, f"{do} and start again: its cell is computed anew, the rest is kept.")


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step, so that it is whole or the old one, also where several processes write it.

    Raises:
        CannotRun: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    data = text.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        asked = f"write {len(data):,} bytes to {path}"
        raise CannotRun(asked, str(e.strerror), "Mend that and start again: what is finished is kept.") from e


def write_json(path: Path, value: Any) -> None:
    """The same for any JSON value."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
