"""A toy sweep for Ray's workers. They import this file, and with it nothing that takes long."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from saccade.core.errors import CannotRun


@dataclass(frozen=True)
class Toy:
    """A cell that ends well, raises, or kills its worker: the first time or every time."""

    key: str
    does: str = "well"
    folder: str = ""
    vital: bool = False
    alone: bool = False

    def head(self) -> dict:
        return {"key": self.key}

    def __str__(self) -> str:
        return self.key


class Toys:
    """Works on them."""

    about = SimpleNamespace(mark="a")

    def work(self, cell: Toy) -> dict:
        if cell.does == "raises":
            raise ValueError("no good")
        died = Path(cell.folder) / f"{cell.key}.died"
        if cell.does == "kills" or (cell.does == "kills once" and not died.exists()):
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return {"pid": os.getpid()}


class Broken:
    """Cannot be made."""

    def __init__(self):
        raise CannotRun("load x", "it is not there", "Put it there.")
