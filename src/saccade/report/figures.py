"""The figures, as plain plotly data. Every number in them stands in the run; colours that follow the theme are names.

A figure has variants, one for each choice of its choosers; page.js draws the chosen one and puts the theme's colours
in for "$fg", "$muted" and "$band". Intervals are drawn as lines from low to high, so nothing need be subtracted.
"""

from __future__ import annotations

import base64
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saccade.measure.codes import mass_code, share_code
from saccade.report import tables
from saccade.report.heads import Heads
from saccade.report.run import Run
from saccade.report.words import interval, say

if TYPE_CHECKING:
    from saccade.measure.attended import Attended, Maps, Stretch

# Okabe and Ito's palette without black and grey, which are `full` and `random`; yellow last: it is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
SYMBOLS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "triangle-down": "▼",
    "cross": "✚",
    "star": "★",
    "square-open": "□",
}
FONT_PX = 13


@dataclass(frozen=True)
class Style:
    """How one label looks in every figure and in the legend. Seven colours and eight symbols: 56 pairs."""

    colour: str
    symbol: str
    glyph: str
    dash: str = "solid"


FULL = Style("$fg", "line-ew-open", "━")
CHANCE = (
    Style("$muted", "x", "✕", "dot"),
    Style("$muted", "asterisk-open", "✱", "dash"),
    Style("$muted", "hash-open", "#", "dashdot"),
)


@dataclass(frozen=True)
class Chooser:
    """A list from which the reader picks one: (value, text) pairs."""

    title: str
    options: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """What plotly draws, under the values of the choosers joined by "|"."""

    name: str
    title: str
    variants: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Plots:
    """Figures that follow the same choosers, and the tables that they were drawn from."""

    name: str
    choosers: Sequence[Chooser]
    figures: Sequence[Figure]
    tables: Sequence[tables.Table] = ()


def styles(run: Run) -> dict[str, Style]:
    """label -> style; the same label looks the same everywhere. What chooses at random is grey."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(SYMBOLS.items()))
    others = (Style(colour, symbol, glyph) for colour, (symbol, glyph) in pairs)
    fixed = {"full": itertools.repeat(FULL), "random": itertools.cycle(CHANCE)}
    methods = {row["label"]: row["method"] for row in [*run.rows, *run.summary["speed"]]}
    return {label: next(fixed.get(method, others)) for label, method in methods.items()}


def _layout(x: str, y: str, xaxis: dict, yaxis: dict) -> dict[str, Any]:
    line = {"gridcolor": "$grid", "linecolor": "$muted", "zeroline": False, "ticks": "outside", "tickcolor": "$muted"}
    return {
        "font": {"size": FONT_PX, "color": "$fg", "family": "inherit"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "margin": {"l": 64, "r": 16, "t": 16, "b": 56},
        "xaxis": line | {"title": {"text": x, "font": {"size": FONT_PX}}, "automargin": True} | xaxis,
        "yaxis": line | {"title": {"text": y, "font": {"size": FONT_PX}}, "automargin": True} | yaxis,
    }


def _series(label: str, style: Style, x: list, y: list, hover: list[str]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(label),
        "meta": label,
        "x": x,
        "y": y,
        "text": [html.escape(h) for h in hover],
        "hovertemplate": f"<b>{html.escape(label)}</b><br>%{{text}}<extra></extra>",
        "line": {"color": style.colour, "width": 1.5, "dash": style.dash},
        "marker": _marker(style),
    }


def _marker(style: Style) -> dict[str, Any]:
    # what is open is drawn by its line alone; what is filled gets a thin one, so that yellow is seen on white
    line = {"color": style.colour, "width": 2} if style.symbol.endswith("-open") else {"color": "$fg", "width": 0.5}
    return {"color": style.colour, "symbol": style.symbol, "size": 9, "line": line}


def _bars(label: str, style: Style, rows: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Intervals (x, low, high) as vertical strokes."""
    return {
        "type": "scatter",
        "mode": "lines",
        "meta": label,
        "x": [v for x, _, _ in rows for v in (x, x, None)],
        "y": [v for _, low, high in rows for v in (low, high, None)],
        "line": {"color": style.colour, "width": 1.5},
        "opacity": 0.55,
        "hoverinfo": "skip",
    }


# --- quality against what was kept ---------------------------------------------------------------------------------

# name: (title of the choice, title of the axis)
AXES = {
    "kept": ("Share kept", "kept, of what the method's part may use"),
    "bytes": ("Cache, bytes", "bytes held in the cache"),
    "seconds": ("Prefill, seconds", "seconds of prefill, median"),
}


def frontier(run: Run, looks: dict[str, Style]) -> Plots:
    """Paired difference to `full` against what was kept; up is better."""
    variants = {f"{task}|{axis}": _frontier(run, task, axis, looks) for task in run.compared for axis in AXES}
    choosers = [
        Chooser("Task", [(t, run.summary["tasks"][t].get("title", t)) for t in run.compared]),
        Chooser("Against", [(axis, title) for axis, (title, _) in AXES.items()]),
    ]
    figures = [Figure("frontier", "Difference to full against what was kept", variants)] if variants else []
    return Plots("frontier", choosers, figures, [tables.points(run), tables.noise(run)])


def _frontier(run: Run, task: str, axis: str, looks: dict[str, Style]) -> dict[str, Any]:
    every = [(_place(row, axis), row) for row in run.rows if row["task"] == task and row["method"] != "full"]
    points = sorted(((x, row) for x, row in every if x is not None), key=lambda p: p[0])
    absent = dict.fromkeys(row["label"] for x, row in every if x is None)
    lower = run.summary["tasks"][task]["metric"] == "nll"
    y = "loss above full, nats per token" if lower else "hit rate, difference to full"
    scale = _scale(axis, [x for x, _ in points])
    layout = _layout(AXES[axis][1], y, scale, {"autorange": "reversed"} if lower else {})
    if not points:
        return {"data": [], "layout": layout | _nothing("This task runs in one pass: it holds no cache.")}
    labels = dict.fromkeys(row["label"] for _, row in points)
    traces = [_with_intervals(label, looks[label], [p for p in points if p[1]["label"] == label]) for label in labels]
    return {"data": list(itertools.chain(*traces)), "layout": layout | _full_line(run, task, absent)}


def _place(row: dict, axis: str) -> float | None:
    return tables.kept(row) if axis == "kept" else row.get({"bytes": "bytes_held", "seconds": "seconds_prefill"}[axis])


def _scale(axis: str, values: Sequence[float]) -> dict[str, Any]:
    if axis == "bytes" and values:
        return _byte_ticks(values)
    return {"rangemode": "tozero", "tickformat": ".0%" if axis == "kept" else "~g"}


def _nothing(why: str) -> dict[str, Any]:
    middle = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}
    return {"annotations": [middle | {"text": why}], "xaxis": {"visible": False}, "yaxis": {"visible": False}}


def _with_intervals(label: str, style: Style, points: list[tuple[float, dict]]) -> list[dict]:
    hover = [f"budget {r['budget']}: {interval(r)}, kept {say(tables.kept(r), 'share')}" for _, r in points]
    xs, ys = [x for x, _ in points], [r["diff"] for _, r in points]
    spans = [(x, r["diff_low"], r["diff_high"]) for x, r in points if r["diff_low"] is not None]
    return [_bars(label, style, spans), _series(label, style, xs, ys, hover)]


def _full_line(run: Run, task: str, absent: Mapping[str, None]) -> dict[str, Any]:
    """The line of full, its noise, and in words what has no place on this axis."""
    across = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
    shapes = [across | {"type": "line", "y0": 0, "y1": 0, "line": {"color": "$fg", "width": 1.5}}]
    spread = run.summary["noise"].get(task)
    if spread:
        shapes.append(across | {"y0": -spread, "y1": spread, "fillcolor": "$band", "line": {"width": 0}})
    full = next(r for r in run.rows if r["method"] == "full" and r["task"] == task)
    words = f"full = {say(full['mean'], 'score')}"
    note = {"text": words, "xref": "paper", "x": 0, "xanchor": "left", "y": 0, "yanchor": "bottom", "showarrow": False}
    gone = note | {"text": html.escape(f"not on this axis: {', '.join(absent)}"), "yref": "paper", "y": 1}
    return {"shapes": shapes, "annotations": [note, gone] if absent else [note]}


# --- seconds and bytes against length ------------------------------------------------------------------------------

WHOLE = "1"  # the budget of full, and of what takes none: they are in every panel
PANELS = (
    ("prefill", "Prefill", "prefill_seconds", "seconds", "seconds"),
    ("decode", "Decode, one token", "decode_seconds", "seconds per token", "seconds"),
    ("bytes", "Cache", "bytes_held", "bytes", "bytes"),
    ("warmup", "Warm-up, not counted above", "warmup_seconds", "seconds", "seconds"),
)


def speeds(run: Run, looks: dict[str, Style]) -> Plots:
    """One panel for each of prefill, decode, bytes and warm-up, with the budget chosen for all at once."""
    rows = run.summary["speed"]
    budgets = list(dict.fromkeys(r["budget"] for r in rows if r["method"] != "full"))
    budgets = [b for b in budgets if b != WHOLE] or budgets
    figures = [
        Figure(panel[0], panel[1], {b: _panel(run, panel, b, looks) for b in budgets})
        for panel in PANELS
        if any(r.get(panel[2]) is not None for r in rows)
    ]
    return Plots(
        "speed", [Chooser("Budget", [(b, b) for b in budgets])], figures, [tables.speed(run), tables.crossover(run)]
    )


def _panel(run: Run, panel: tuple[str, ...], budget: str, looks: dict[str, Style]) -> dict[str, Any]:
    name, _, value, unit, kind = panel
    rows = [r for r in run.summary["speed"] if r.get(value) is not None]
    rows = [r for r in rows if r["budget"] in (budget, WHOLE)]
    data = []
    for label in dict.fromkeys(r["label"] for r in rows):
        mine = sorted((r for r in rows if r["label"] == label), key=lambda r: r["tokens"])
        hover = [f"{say(r['tokens'], 'count')} tokens: {say(r[value], kind)}" for r in mine]
        data.append(_series(label, looks[label], [r["tokens"] for r in mine], [r[value] for r in mine], hover))
    lengths = sorted({r["tokens"] for r in rows})
    x = {"type": "log", "tickvals": lengths, "ticktext": [say(n, "count") for n in lengths]}
    y = _byte_ticks([r[value] for r in rows]) if kind == "bytes" else SCALES[name]
    return {"data": data, "layout": _layout("tokens", unit, xaxis=x, yaxis=y) | _crossings(run, name, budget, looks)}


SECONDS = {"type": "log", "tickformat": "~g"}
SCALES = {"prefill": SECONDS, "decode": SECONDS, "warmup": {"rangemode": "tozero"}}


def _byte_ticks(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with ticks at powers of two, or of four where those were too many."""
    least, most = (math.floor(math.log2(f(values))) for f in (min, max))
    ticks = [2**k for k in range(least, most + 2, 1 if most - least < 6 else 2)]
    return {"type": "log", "tickvals": ticks, "ticktext": [say(t, "bytes") for t in ticks]}


def _crossings(run: Run, stage: str, budget: str, looks: dict[str, Style]) -> dict[str, Any]:
    """A dotted line where a method becomes faster than `full`; none for what is faster at every length."""
    shortest = min(r["tokens"] for r in run.summary["speed"])
    found = [c for c in run.summary["crossover"] if c["stage"] == stage and c["budget"] in (budget, WHOLE)]
    found = [c for c in found if c["tokens"] is not None and c["tokens"] > shortest]
    found.sort(key=lambda c: c["tokens"])
    return {
        "shapes": [_upright(c["tokens"], looks[c["label"]]) for c in found],
        "annotations": [_flag(i, c["tokens"], looks[c["label"]]) for i, c in enumerate(found)],
    }


def _upright(tokens: float, look: Style) -> dict[str, Any]:
    line = {"color": look.colour, "width": 1.5, "dash": "dot"}
    return {"type": "line", "x0": tokens, "x1": tokens, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _flag(i: int, tokens: float, look: Style) -> dict[str, Any]:
    # the x of an annotation on a logarithmic axis is the exponent: page.js takes the logarithm
    at = {"x": tokens, "xanchor": "right", "yref": "paper", "y": 1, "yanchor": "top", "yshift": -18 * i}
    text = f'<span style="color:{look.colour}">{look.glyph}</span> {say(tokens, "count")}'
    return at | {"text": text, "showarrow": False, "bgcolor": "$bg"}


# --- what was kept -------------------------------------------------------------------------------------------------


def heat_map(run: Run) -> Plots:
    """What is kept or read of each stretch of the prompt, layer by layer and head by head."""
    variants: dict[str, dict[str, Any]] = {}
    for cell in run.cells:
        if cell.get("kept"):
            name = f"{cell['label']} at {cell['budget']}: {_what(cell['kept'])}"
            if name not in variants:
                variants[name] = _heat(cell["kept"])
    figures = [Figure("kept-map", "Layer by head by position", variants)] if variants else []
    return Plots("kept", [Chooser("Method", [(n, n) for n in variants])], figures)


def _what(kept: dict) -> str:
    """What a picture shows, in words."""
    said = {"kept": "keys stored", "bits": f"bits of {kept['bits']}", "read": "queries that read it"}
    return said[kept["what"]]


def _heat(kept: dict) -> dict[str, Any]:
    heads = [head for layer in kept["share"] for head in layer]
    names = [f"{i}.{j}" for i, layer in enumerate(kept["share"]) for j in range(len(layer))]
    trace = {"type": "heatmap", "z": _packed(heads), "y": names, "zmin": 0, "zmax": 100, "colorscale": "Cividis"}
    trace |= {"colorbar": {"ticksuffix": " %", "thickness": 12, "outlinewidth": 0, "title": {"text": _what(kept)}}}
    trace |= {"hovertemplate": "layer.head %{y}, stretch %{x}: %{z} %<extra></extra>"}
    firsts = [name for name in names if name.endswith(".0")]
    y = {"type": "category", "autorange": "reversed", "tickvals": firsts, "ticktext": [n[:-2] for n in firsts]}
    layout = _layout(
        "position in the prompt, oldest left", "layer (a row is a head)", {"ticks": "", "showticklabels": False}, y
    )
    return {"data": [trace], "layout": layout}


# --- heads ---------------------------------------------------------------------------------------------------------


def heads_map(heads: Heads) -> Plots:
    """What an artefact says of each head: a row is a layer."""
    figures = [Figure("heads-map", "Layer by head", {name: _by_head(heads.values(name), name) for name in heads.names})]
    return Plots("heads", [Chooser("Shown", [(n, n) for n in heads.names])], figures, [heads.table()])


def _by_head(values: list[list[float]], name: str) -> dict[str, Any]:
    layers, width = len(values), len(values[0])
    trace = {"type": "heatmap", "z": values, "zmin": 0, "colorscale": "Cividis", "xgap": 1, "ygap": 1}
    trace |= {"colorbar": {"thickness": 12, "outlinewidth": 0, "title": {"text": html.escape(name)}}}
    trace |= {"hovertemplate": f"layer %{{y}}, head %{{x}}: %{{z:.3f}} {html.escape(name)}<extra></extra>"}
    whole = {"showgrid": False, "tickformat": "d"}
    x, y = ({"dtick": max(1, -(-n // 16))} | whole for n in (width, layers))
    return {"data": [trace], "layout": _layout("head", "layer", x, y | {"autorange": "reversed"})}


# --- what a method attends to --------------------------------------------------------------------------------------



def attended_maps(found: Attended) -> Plots:
    """What was chosen beside where the exact mass lies, for every layer and head."""
    chosen, mass = {}, {}
    for stretch in found.stretches:
        for layer, maps in enumerate(stretch.layers):
            for head in range(len(maps.covered)):
                key = f"{stretch.stage}|{layer}|{head}"
                chosen[key], mass[key] = _chosen(stretch, maps, head), _mass(stretch, maps, head)
    layers = found.stretches[0].layers
    choosers = [
        Chooser("Queries", [(s.stage, tables.STAGES[s.stage]) for s in found.stretches]),
        Chooser("Layer", [(str(i), str(i)) for i in range(len(layers))]),
        Chooser("Head", [(str(i), str(i)) for i in range(len(layers[0].covered))]),
    ]
    figures = [Figure("chosen-map", "What was chosen", chosen), Figure("mass-map", "Where the exact mass lies", mass)]
    return Plots("attended", choosers, figures, [tables.attended(found)])


def _chosen(stretch: Stretch, maps: Maps, head: int) -> dict[str, Any]:
    codes = [[share_code(x) for x in row] for row in maps.chosen[head].tolist()]
    trace = {"zmin": 0, "zmax": 100, "colorbar": {"ticksuffix": " %"}, "meta": "share"}
    trace |= {"hovertemplate": "query %{y:.0f}, key %{x:.0f}: %{z} % of the pairs<extra></extra>"}
    said = f"{say(float(maps.density[head]), 'share')} of the pairs"
    return _map(stretch, codes, trace, said)


def _mass(stretch: Stretch, maps: Maps, head: int) -> dict[str, Any]:
    pairs = zip(maps.mass[head].tolist(), maps.chosen[head].tolist())
    codes = [[mass_code(x, c) for x, c in zip(*rows)] for rows in pairs]
    ticks = {"tickvals": [-4, -3, -2, -1, 0], "ticktext": ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"]}
    trace = {"zmin": -4, "zmax": 0, "colorbar": ticks, "meta": "mass"}
    trace |= {"hovertemplate": "query %{y:.0f}, key %{x:.0f}: %{customdata:.3~f} % of the mass<extra></extra>"}
    said = f"{say(float(maps.covered[head]), 'share')} of this mass lies on what was chosen"
    return _map(stretch, codes, trace, said)


def _map(stretch: Stretch, codes: list[list[int]], trace: dict[str, Any], said: str) -> dict[str, Any]:
    """A map over positions: the middles of the stretches."""
    high, wide = stretch.queries / len(codes), stretch.keys / len(codes[0])
    places = {"x0": wide / 2, "dx": wide, "y0": stretch.first + high / 2, "dy": high}
    bar = {"thickness": 12, "outlinewidth": 0} | trace["colorbar"]
    whole = {"type": "heatmap", "z": _bytes(codes), "colorscale": "Cividis", **places, **trace, "colorbar": bar}
    layout = _layout("key, by position", "query, by position", {"showgrid": False}, {"showgrid": False})
    layout["yaxis"] |= {"autorange": "reversed"}
    layout["margin"] |= {"t": 40}
    return {"data": [whole], "layout": layout | {"title": {"text": said, "font": {"size": FONT_PX}, "x": 0.5}}}


def _packed(rows: list[list[float]]) -> dict[str, str]:
    """Shares as whole per cents, one byte each: a tenth of the same in JSON."""
    return _bytes([[round(100 * share) for share in row] for row in rows])


def _bytes(rows: list[list[int]]) -> dict[str, str]:
    flat = bytes(itertools.chain.from_iterable(rows))
    return {"dtype": "u1", "bdata": base64.b64encode(flat).decode(), "shape": f"{len(rows)}, {len(rows[0])}"}
