"""The generated part of docs/explanation/scale.md, and its picture. Called by docs/make.py."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from svg import INK, Look, Panel, Series, picture  # noqa: E402

from saccade.measure import scale  # noqa: E402
from saccade.measure.scale import BY_NAME, WAYS, Cluster, Split, Way  # noqa: E402
from saccade.models.shapes import SHAPES, Shape  # noqa: E402
from saccade.report.figures import COLOURS  # noqa: E402
from saccade.report.words import MISSING, say  # noqa: E402

M = 2**20
PLACES = ((M, 8), (10 * M, 64), (100 * M, 1024))  # tokens and GPUs of a table
COUNTS = [2**i for i in range(11)]
DRAWN = {"full": (INK, ""), "hip": (COLOURS[0], "circle"), "blocks@0.10": (COLOURS[1], "square"),
         "window@4100tok": (COLOURS[2], "diamond"), "snapkv": (COLOURS[3], "triangle"), "quest": (COLOURS[4], "cross"),
         "tidaldecode": (COLOURS[0], "square"), "linear": (COLOURS[2], "circle")}  # fmt: skip
Row = list[str]


def millions(tokens: int | None) -> str:
    """As the command line takes it."""
    if tokens is None:
        return "never"
    return f"{tokens // M}M" if tokens >= M else f"{tokens // 1024}k"


def tables(name: str) -> Iterator[tuple[str, Row, list[Row]]]:
    """(title, heads, rows) of prefill, of decoding and of the cache."""
    shape = SHAPES[name]
    for phase, title in (("prefill", "a prefill"), ("decode", "a step of one sequence")):
        places = [f"{millions(n)}, {g:,} GPUs" for n, g in PLACES]
        heads = ["method", "family", *places, "pays from, 8 GPUs", *(f"up to, {millions(n)}" for n, _ in PLACES)]
        rows = [phase_row(shape, way, phase) for way in WAYS if phase in scale.phases(way)]
        yield f"{name}: {title}, and how many times faster than dense", heads, rows
    heads = ["method", *(f"{millions(n)}: cache" for n, _ in PLACES), *(f"{millions(n)}: GPUs" for n, _ in PLACES)]
    held = [way for way in WAYS if way.decode or way.name in ("full", "linear")]
    yield f"{name}: bytes of the cache, and the fewest GPUs that hold it with the weights", heads, [
        cache_row(shape, way) for way in held
    ]


def phase_row(shape: Shape, way: Way, phase: str) -> Row:
    """Of a way: seconds and gain at each place, and where it pays."""
    cells = []
    for tokens, gpus in PLACES:
        found, gain = (f(shape, way, phase, tokens, Cluster(gpus)) for f in (scale.cost, scale.gain))
        cells.append(say(found.seconds, "seconds") + times(gain) * bool(way.family) if found.fits else "does not fit")
    if not way.family:
        return [scale.label(way), MISSING, *cells, *[MISSING] * (1 + len(PLACES))]
    most = [scale.pays_to(shape, way, phase, tokens, Cluster(1)) for tokens, _ in PLACES]
    counts = ["never" if n is None else f"{n:,}" for n in most]
    return [scale.label(way), way.family, *cells, millions(scale.pays_from(shape, way, phase, Cluster(8))), *counts]


def times(gain: float | None) -> str:
    """In brackets."""
    if gain is None:
        return ""
    return " (dense does not fit)" if gain == math.inf else f" ({gain:,.0f})" if gain >= 100 else f" ({gain:.3g})"


def cache_row(shape: Shape, way: Way) -> Row:
    """Bytes at each place, and the least GPUs."""
    held = [say(scale.cache_bytes(shape, way, tokens), "bytes") for tokens, _ in PLACES]
    least = [scale.least_gpus(shape, way, tokens, Cluster(1)) for tokens, _ in PLACES]
    return [scale.label(way), *held, *("over 1,024" if n is None else f"{n:,}" for n in least)]


def agreement() -> tuple[Row, list[Row]]:
    """Whole prefills that were measured, beside the same out of parts."""
    rows, llama = [], SHAPES["llama-3-8b"]
    for row in scale.measured()["whole"]:
        if row["method"] in BY_NAME:
            shape = dataclasses.replace(llama, layers=row["layers"])
            parts = scale.prefill_parts(shape, BY_NAME[row["method"]], row["tokens"], Split(1, 1), Cluster(1))
            found = sum(parts.values())
            told = [say(row["seconds"], "seconds"), say(found, "seconds"), f"{found / row['seconds']:.2f}"]
            rows.append([row["method"], f"{row['tokens'] // 1024}k", str(row["layers"]), *told])
    return ["method", "tokens", "layers", "measured", "reckoned", "reckoned / measured"], rows


def drawn() -> str:
    """Seconds against GPUs, at 1M and at 100M tokens."""
    panels = []
    for phase, of in (("prefill", "a prefill"), ("decode", "a step")):
        for tokens in (M, 100 * M):
            panels.append(panel(phase, tokens, f"{of}, {millions(tokens)} tokens"))
    return picture("Llama-3-8B on many GPUs, reckoned", panels, 2)


def panel(phase: str, tokens: int, title: str) -> Panel:
    """Of the GPUs that hold it."""
    series, factor = [], 1.0 if phase == "prefill" else 1e3
    for name, (colour, form) in DRAWN.items():
        if phase in scale.phases(BY_NAME[name]):
            costs = [(n, scale.cost(SHAPES["llama-3-8b"], BY_NAME[name], phase, tokens, Cluster(n))) for n in COUNTS]
            points = [(n, factor * c.seconds) for n, c in costs if c.fits]
            series.append(Series(scale.label(BY_NAME[name]), Look(colour, form), points))
    marks = [(n, f"{n:,}") for n in COUNTS if any(x == n for s in series for x, _ in s.points)]
    return Panel(title, "GPUs", "s" if phase == "prefill" else "ms", marks[:: 1 + (len(marks) > 7)], series)
