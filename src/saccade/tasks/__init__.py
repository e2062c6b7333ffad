"""What quality is measured on. One file per task; the file name is the task's name. Listing them imports no torch."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.tasks._shelf import Shelf

if TYPE_CHECKING:
    from saccade.tasks._base import Sample, Task

_SHELF = Shelf(Path(__file__).parent, "saccade.tasks", "task", "See them with: saccade list")


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    return list(_SHELF.files())


@functools.cache
def describe(name: str) -> dict[str, Any]:
    """The class attributes of a task (title, metric, chance, spread, ...), read from its source.

    Raises:
        UnknownName: there is no such task; the nearest are said.
    """
    return {"one_pass": False, "chance": None} | _SHELF.describe(name)


def get(name: str) -> Task:
    """A task by name; hyphens and underscores both do.

    Raises:
        UnknownName: there is no such task; the nearest are said.
    """
    return _SHELF.kind_of(name)()


def __getattr__(name: str):
    if name in ("Sample", "Task"):
        return getattr(importlib.import_module("saccade.tasks._base"), name)
    if name in ("moby_dick", "passage"):
        return getattr(importlib.import_module("saccade.tasks._text"), name)
    raise AttributeError(f"module 'saccade.tasks' has no attribute {name!r}")


__all__ = ["Sample", "Task", "describe", "get", "list_tasks"]
