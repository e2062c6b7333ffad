"""Numbers as text, one way for every format of the report: rounded, with their unit, a true minus sign."""

from __future__ import annotations

import math
from collections.abc import Callable

MISSING = "–"
_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_SECONDS = ((1.0, "s", 1), (1e-3, "ms", 1e3))


def _plain(x: float) -> str:
    """Three significant digits, never in the scientific notation."""
    digits = 2 if x == 0 else max(0, 2 - math.floor(math.log10(abs(x))))
    return f"{x:,.{min(digits, 6)}f}"


def _bytes(x: float) -> str:
    size, unit = next(((s, u) for s, u in _BYTES if x >= s), (1, "B"))
    return f"{_plain(x / size)} {unit}"


def _seconds(x: float) -> str:
    unit, factor = next(((u, f) for least, u, f in _SECONDS if x >= least), ("µs", 1e6))
    return f"{_plain(x * factor)} {unit}"


_SAY: dict[str, Callable[[float], str]] = {
    "count": lambda x: f"{x:,.0f}",
    "share": lambda x: f"{_plain(100 * x)} %",
    "bytes": _bytes,
    "seconds": _seconds,
    "short": lambda x: f"{x:.3g}",
    "times": lambda x: f"{x:.2f} ×",
    "score": lambda x: f"{x:.3f}",
    "difference": lambda x: f"{x:+.3f}",
}
KINDS = tuple(_SAY)


def say(x: float | str | None, kind: str = "text") -> str:
    """A value as text. `kind`: text or one of KINDS; "share" is of one, "difference" signed, "short" three digits."""
    if x is None or (isinstance(x, float) and not math.isfinite(x)):
        return MISSING
    return str(x) if isinstance(x, str) else _SAY[kind](x).replace("-", "−")


def interval(row: dict, stem: str = "diff") -> str:
    """`+0.120 [+0.050, +0.190]`: the middle and its interval."""
    kind = "difference" if stem == "diff" else "score"
    low, high = ("diff_low", "diff_high") if stem == "diff" else ("low", "high")
    middle = say(row.get(stem), kind)
    if row.get(low) is None or row.get(high) is None:
        return middle
    return f"{middle} [{say(row[low], kind)}, {say(row[high], kind)}]"
