"""What quality is measured on. One file per task; the file name is the task's name. Listing them imports no torch."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.core.errors import UnknownName

if TYPE_CHECKING:
    from saccade.tasks._base import Sample, Task

FOLDER = Path(__file__).parent


@functools.lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    return {f.stem.replace("_", "-"): f for f in sorted(FOLDER.glob("*.py")) if not f.stem.startswith("_")}


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    return list(_files())


def _file(name: str) -> Path:
    key = name.replace("_", "-")
    if key not in _files():
        raise UnknownName("task", name, _files(), "See them with: saccade list")
    return _files()[key]


@functools.cache
def describe(name: str) -> dict[str, Any]:
    """The class attributes of a task (title, metric, chance, spread, ...), read from its source.

    Raises:
        UnknownName: there is no such task; the nearest are said.
    """
    tree = ast.parse(_file(name).read_text(encoding="utf-8"))
    (task,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    said = {"one_pass": False, "chance": None, "about": ast.get_docstring(task)}
    for line in task.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            said[line.targets[0].id] = ast.literal_eval(line.value)
    return said


def get(name: str) -> Task:
    """A task by name; hyphens and underscores both do.

    Raises:
        UnknownName: there is no such task; the nearest are said.
    """
    module = importlib.import_module(f"saccade.tasks.{_file(name).stem}")
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__:
            return value()
    raise AssertionError(f"{module.__name__} defines no task")


def __getattr__(name: str):
    if name in ("Sample", "Task"):
        return getattr(importlib.import_module("saccade.tasks._base"), name)
    if name in ("moby_dick", "passage"):
        return getattr(importlib.import_module("saccade.tasks._text"), name)
    raise AttributeError(f"module 'saccade.tasks' has no attribute {name!r}")


__all__ = ["Sample", "Task", "describe", "get", "list_tasks"]
