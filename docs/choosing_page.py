"""The generated part of docs/speed-gpu.md on single layers: choosing, and growth. Called by docs/make.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stored import RESULTS, newest

Row = list[str]


def choosing() -> tuple[Row, list[Row]]:
    """Of whole calls forward, and of both ways where they were measured."""
    rows = [(row, "forward") for row in newest("sparse")[1]["rows"]]
    rows += [(row, "both ways") for row in newest("sparse-backward")[1]["rows"]]
    heads = ["method", "tokens", "density", "", "choosing, ms", "all, ms", "times less than", "choosing over saved"]
    return heads, [_choosing(row, way) for row, way in rows]


def _choosing(row: dict[str, Any], way: str) -> Row:
    times = ", ".join(f"{name} {x:.2f}" for name, x in row["times"].items())
    cost = "saves nothing" if row["cost"] is None else f"{row['cost']:.3f}"
    numbers = [f"{row['choose_ms']:.2f}", f"{row['ms']:.2f}"]
    return [f"`{row['method']}`", f"{row['tokens']:,}", f"{row['density']:.3f}", way, *numbers, times, cost]


def growth() -> tuple[Row, list[Row]]:
    """Milliseconds of a layer against length, and the power of the length that they grow with, with that of the last
    two lengths, where what does not grow weighs least."""
    rows, lengths = [], []
    for layer in _grown():
        lengths = [at["tokens"] for at in layer]
        rows.append([f"`{layer[0]['layer']}`", *(f"{1000 * at['seconds']:.1f}" for at in layer), *_powers(layer)])
    return ["layer", *(f"{n // 1024}k" for n in lengths), "power", "at the end"], rows


def _grown() -> Iterator[list[dict[str, Any]]]:
    """Rows of each layer; full attention, which every file has, of the first file."""
    names = sorted({p.stem.rsplit("-", 4)[0] for p in RESULTS.glob("growth-*.json")})
    for i, name in enumerate(names):
        rows = newest(name)[1]["layers"]
        for layer in dict.fromkeys(row["layer"] for row in rows):
            if layer != "full" or i == 0:
                yield [row for row in rows if row["layer"] == layer]


def _powers(layer: list[dict[str, Any]]) -> Iterator[str]:
    from saccade.measure.layers import slopes

    for some in (layer, layer[-3:]):
        yield "".join(f"{row['power']:.2f}" for row in slopes(some, ("layer",)))
