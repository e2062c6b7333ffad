"""What several methods demand of their options, in the same words."""

from __future__ import annotations

import math
from typing import Any

from saccade.core.errors import BadOption


def at_least_one(method: Any, *names: str) -> None:
    """Of options that count something.

    Raises:
        BadOption: one below 1.
    """
    for name in names:
        _refuse(method, name, getattr(method, name) < 1, "at least 1", "Leave it away for our value.")


def above_zero(method: Any, *names: str) -> None:
    """Of rates and weights.

    Raises:
        BadOption: one that is not above 0, or no finite number.
    """
    for name in names:
        _refuse(method, name, not 0 < getattr(method, name) < math.inf, "a number above 0", "Leave it away.")


def share(method: Any, name: str, of: str) -> None:
    """Of a part of something, all of it included.

    Raises:
        BadOption: it lies outside (0, 1].
    """
    wrong = not 0 < getattr(method, name) <= 1
    _refuse(method, name, wrong, f"a share of {of}, above 0 to 1", "Leave it away.")


def _refuse(method: Any, name: str, wrong: bool, takes: str, do: str) -> None:
    if wrong:
        raise BadOption(f"{method.card.name}.{name}={getattr(method, name)}", f"it takes {takes}", do)
