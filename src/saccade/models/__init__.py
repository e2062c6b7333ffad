"""Models: four known ones fetched from package indexes, anything transformers loads, and tiny random ones for tests.

Importing this package imports neither torch nor transformers; `KNOWN` and `is_cached` never do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "KNOWN": "known",
    "Known": "known",
    "is_cached": "known",
    "load": "loading",
    "tiny": "families",
    "tiny_llava": "vision",
    "FAMILIES": "families",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'saccade.models' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"saccade.models.{_HOMES[name]}"), name)


if TYPE_CHECKING:
    from saccade.models.families import FAMILIES, tiny
    from saccade.models.known import KNOWN, Known, is_cached
    from saccade.models.loading import load
    from saccade.models.vision import tiny_llava
