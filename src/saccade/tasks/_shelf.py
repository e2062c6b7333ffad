"""A folder of tasks: one file each, whose name is the task's name. Listing and describing them imports no torch."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.core.errors import UnknownName


@dataclass(frozen=True)
class Shelf:
    """The tasks of a package. kind: what one of them is called; see: where to see them all."""

    folder: Path
    package: str
    kind: str
    see: str

    def files(self) -> dict[str, Path]:
        """Name -> file, sorted."""
        found = sorted(self.folder.glob("*.py"))
        return {f.stem.replace("_", "-"): f for f in found if not f.stem.startswith("_")}

    def file(self, name: str) -> Path:
        """The file of a task; hyphens and underscores both do.

        Raises:
            UnknownName: there is no such task; the nearest are said.
        """
        key = name.replace("_", "-")
        if key not in self.files():
            raise UnknownName(self.kind, name, self.files(), self.see)
        return self.files()[key]

    def describe(self, name: str) -> dict[str, Any]:
        """The class attributes of a task, which are literals, and its docstring as "about"."""
        tree = ast.parse(self.file(name).read_text(encoding="utf-8"))
        (task,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
        said: dict[str, Any] = {"about": ast.get_docstring(task)}
        for line in task.body:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                said[line.targets[0].id] = ast.literal_eval(line.value)
        return said

    def kind_of(self, name: str) -> type:
        """The class of a task, imported."""
        module = importlib.import_module(f"{self.package}.{self.file(name).stem}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                return value
        raise AssertionError(f"{module.__name__} defines no task")
