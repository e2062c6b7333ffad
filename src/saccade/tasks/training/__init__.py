"""What the small nets are trained on: `saccade train --task NAME`. One file per task; listing them imports no torch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.tasks._shelf import Shelf

if TYPE_CHECKING:
    from saccade.tasks.training._base import Batch, TrainingTask

_SHELF = Shelf(Path(__file__).parent, "saccade.tasks.training", "training task", "See: saccade train --help")


def list_training_tasks() -> list[str]:
    """Names of all of them, sorted."""
    return list(_SHELF.files())


def describe(name: str) -> dict[str, Any]:
    """The class attributes of a task (title, metric, tokens, ...), read from its source.

    Raises:
        UnknownName: there is no such task; the nearest are said.
    """
    return _SHELF.describe(name)


def get(name: str, tokens: int | None = None) -> TrainingTask:
    """A task by name, with rows of so many tokens; None: its own number.

    Raises:
        UnknownName: there is no such task; the nearest are said.
        BadOption: a length that it cannot have.
    """
    return _SHELF.kind_of(name)(tokens)


def __getattr__(name: str):
    if name in ("Batch", "TrainingTask"):
        return getattr(importlib.import_module("saccade.tasks.training._base"), name)
    raise AttributeError(f"module 'saccade.tasks.training' has no attribute {name!r}")


__all__ = ["Batch", "TrainingTask", "describe", "get", "list_training_tasks"]
