"""The generated part of docs/train.md: what benchmarks/orderings.py trained, and how to. Called by docs/make.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from orderings import PAIRS, Pair  # noqa: E402
from stored import RESULTS  # noqa: E402

UNITS = {"accuracy": "accuracy", "bits": "bits per token"}
Row = list[str]


def found() -> list[tuple[Path, dict[str, Any]]]:
    """All results, the newest first."""
    read = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in RESULTS.glob("orderings-*.json")]
    return sorted(read, key=lambda one: one[1]["date"], reverse=True)


def newest(pair: Pair) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """The newest run that has this pair as it is now, and its row; None where there is none."""
    for path, data in found():
        for row in data["pairs"]:
            if row["command"] == pair.command() and row["seeds"]:
                return path, data, row
    return None


def table() -> tuple[Row, list[Row]]:
    """A line for each ordering."""
    heads = ["method", "against", "score", "its", "better by, with its interval", "seeds", "ordering"]
    return heads, [line for pair in PAIRS for line in _lines(pair)]


def _lines(pair: Pair) -> list[Row]:
    here = newest(pair)
    if here is None:
        return [[pair.method, pair.what, "–", "–", "–", "–", "not run yet"]]
    row = here[2]
    scores = {line["mixer"]: line["score"]["mean"] for line in row["mixers"]}
    said = []
    for one in row["orderings"]:
        better, low, high = (one["better_by"][name] for name in ("mean", "low", "high"))
        within = "" if low is None else f" [{low:.3g}, {high:.3g}]"
        mine = f"{scores[one['mixer']]:.3f} {UNITS[row['metric']]}"
        told = [mine, f"{scores[one['against']]:.3f}", f"{better:.3g}{within}", str(row["seeds"]), one["verdict"]]
        said.append([pair.method, f"`{one['against']}`", *told])
    return said


def commands() -> str:
    """What to type for each."""
    return "\n".join(pair.command() for pair in PAIRS)


def measured() -> list[tuple[str, dict[str, Any]]]:
    """File names of the runs that are shown, and on what they were made."""
    shown = [newest(pair) for pair in PAIRS]
    return list({here[0].name: here[1]["environment"] for here in shown if here}.items())
