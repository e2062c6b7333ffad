"""saccade: sparse, cheap and legible attention, with a checked claim for every method.

The public names are loaded on first use, so that `saccade --help` and `saccade list` answer without importing torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_HOMES = {
    "attach": "saccade.attach",
    "compare": "saccade.measure.compare",
    "claim": "saccade.claims.run",
    "explain": "saccade.attach",
    "calibrate": "saccade.attach",
    "replace": "saccade.attach",
    "list_methods": "saccade.core.registry",
    "get": "saccade.core.registry",
    "Budget": "saccade.core.budget",
    "Method": "saccade.core.method",
    "load": "saccade.models",
    "report": "saccade.report",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__ + ["__version__"])


class _Package(ModuleType):
    """`attach` and `report` are functions here and folders too: importing the folder must not hide the function."""

    def __setattr__(self, name: str, value: Any):
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if TYPE_CHECKING:
    from saccade.attach import attach, calibrate, explain, replace
    from saccade.claims.run import claim
    from saccade.core.budget import Budget
    from saccade.core.method import Method
    from saccade.core.registry import get, list_methods
    from saccade.measure.compare import compare
    from saccade.models import load
    from saccade.report import report
