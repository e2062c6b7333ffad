"""Where a training stands, on disk as one whole file: a kill at any moment leaves the one before."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from saccade.core.errors import CannotRun, CorruptResult

NAME = "checkpoint.pt"


def save(folder: Path, mark: str, **state: Any) -> None:
    """Write it, on the disk before it takes the place of the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{NAME}.part"
    with part.open("wb") as file:
        torch.save({"mark": mark, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / NAME)


def load(folder: Path, mark: str) -> dict[str, Any] | None:
    """The last one; None where there is none. No code of the file is run.

    Raises:
        CorruptResult: it cannot be read. CannotRun: it is of another training.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CorruptResult(f"read {file}", "it is no whole checkpoint", "Delete it to begin anew.") from error
    if state["mark"] != mark:
        raise CannotRun(f"go on from {file}", "it was made with other options", "Give the same, or another --out.")
    return state
