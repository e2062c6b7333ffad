"""Small plots as SVG: panels side by side, lines with markers, one legend for all. For benchmarks/plots.py."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

INK, MUTED, GRID = "#222222", "#666666", "#e4e4e4"
WIDE, HIGH = 300, 230  # of what is within the axes
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 34, 50  # around it
LETTER = 7  # width of one in the legend, about
FORMS = {
    "circle": "M{l} {y}A{r} {r} 0 1 1 {m} {y}A{r} {r} 0 1 1 {l} {y}Z",
    "square": "M{l} {t}H{m}V{b}H{l}Z",
    "diamond": "M{x} {t}L{m} {y}L{x} {b}L{l} {y}Z",
    "triangle": "M{x} {t}L{m} {b}H{l}Z",
    "cross": "M{l} {t}L{m} {b}M{l} {b}L{m} {t}",
    "dash": "M{L} {y}H{M}",
}


@dataclass(frozen=True)
class Look:
    """How a series is drawn; `form` is of FORMS, or "" for a line alone. `line` False: markers alone."""

    colour: str
    form: str = "circle"
    hollow: bool = False
    dash: str = ""
    line: bool = True


@dataclass(frozen=True)
class Series:
    """Points (x, y), ascending in x."""

    label: str
    look: Look
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Axes and what they hold. x is logarithmic, with ticks (value, text); y as `log` says, and from 0 if not.

    `level`: a line across, (y, label, look). `values`: the last value of each series is written beside it.
    """

    title: str
    x: str
    y: str
    ticks: Sequence[tuple[float, str]]
    series: Sequence[Series]
    log: bool = True
    top: float | None = None  # the largest that y must have room for
    level: tuple[float, str, Look] | None = None
    values: bool = False


def picture(title: str, panels: Sequence[Panel], columns: int) -> str:
    """The whole file."""
    step_x, step_y = LEFT + WIDE + RIGHT, TOP + HIGH + BOTTOM
    width, y = step_x * min(columns, len(panels)), step_y * math.ceil(len(panels) / columns)
    parts = [_panel(p, i % columns * step_x + LEFT, i // columns * step_y + TOP) for i, p in enumerate(panels)]
    looks = {p.level[1]: p.level[2] for p in panels if p.level} | {s.label: s.look for p in panels for s in p.series}
    legend, end = _legend(looks, width, y + 12)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {end:.0f}" width="{width}" height="{end:.0f}"'
        f' role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12"'
        f' fill="{INK}"><title>{html.escape(title)}</title><rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return "\n".join([head, *parts, legend, "</svg>"]) + "\n"


def _legend(looks: dict[str, Look], width: int, y: float) -> tuple[str, float]:
    """In as many lines as it takes, and where it ends."""
    x, parts = 16.0, []
    for label, look in looks.items():
        needs = 44 + LETTER * len(label)
        if x + needs > width - 8:
            x, y = 16.0, y + 20
        parts += [_line([(x, y), (x + 24, y)], look) if look.line else "", _marker(x + 12, y, look)]
        parts.append(_text(x + 30, y + 4, label))
        x += needs
    return "\n".join(filter(None, parts)), y + 18


def _panel(panel: Panel, left: float, top: float) -> str:
    xs, ys = [v for v, _ in panel.ticks], [y for s in panel.series for _, y in s.points]
    room = (max(xs) / min(xs)) ** (0.2 if panel.values else 0.08) if len(set(xs)) > 1 else 2
    y_ticks = log_ticks(min(ys) / 1.1, max(ys) * 1.1) if panel.log else even_ticks(panel.top or max(ys))

    def across(x: float) -> float:
        return left + WIDE * math.log(x * room / min(xs)) / math.log(room**2 * max(xs) / min(xs))

    def down(y: float) -> float:
        low, high = y_ticks[0], y_ticks[-1]
        return top + HIGH * (1 - (math.log(y / low) / math.log(high / low) if panel.log else y / high))

    parts = [f'<g stroke="{GRID}" fill="none">']
    parts += [f'<path d="M{left} {down(y):.1f}h{WIDE}"/>' for y in y_ticks]
    parts += [f'<path d="M{across(x):.1f} {top}v{HIGH}"/>' for x in xs] + ["</g>"]
    parts.append(f'<path d="M{left} {top}v{HIGH}h{WIDE}" stroke="{MUTED}" fill="none"/>')
    parts += [_text(left - 6, down(y) + 4, f"{y:g}", "end") for y in y_ticks]
    parts += [_text(across(x), top + HIGH + 17, told, "middle") for x, told in panel.ticks]
    parts.append(_text(left + WIDE / 2, top + HIGH + 37, panel.x, "middle"))
    parts.append(f'<g transform="rotate(-90 {left - 44} {top + HIGH / 2})">'
                 f"{_text(left - 44, top + HIGH / 2, panel.y, 'middle')}</g>")  # fmt: skip
    parts.append(_text(left, top - 12, panel.title, weight="600"))
    for series in panel.series:
        points = [(across(x), down(y)) for x, y in series.points]
        if len(points) == 1 and not series.look.form:  # a line alone has nothing else to show a single point with
            parts.append(_line([(points[0][0] - 12, points[0][1]), (points[0][0] + 12, points[0][1])], series.look))
        parts += [_line(points, series.look)] if series.look.line and len(points) > 1 else []
        parts += [_marker(*point, series.look) for point in points]
    if panel.level:
        parts.append(_line([(left, down(panel.level[0])), (left + WIDE, down(panel.level[0]))], panel.level[2]))
    if panel.values:
        last = sorted(((down(s.points[-1][1]), across(s.points[-1][0]), s) for s in panel.series), key=lambda t: t[0])
        parts += _values([(x, y, f"{s.points[-1][1]:.0f}", s.look.colour) for y, x, s in last])
    return "\n".join(filter(None, parts))


def _values(last: list[tuple[float, float, str, str]]) -> list[str]:
    """Texts beside points (x, y, text, colour) that come from above to below, moved down where they would overlap."""
    out, free = [], -math.inf
    for x, y, words, colour in last:
        free = max(y, free + 12)
        out.append(f'<g fill="{colour}" font-size="11">{_text(x + 9, free + 4, words)}</g>')
    return out


def _line(points: Sequence[tuple[float, float]], look: Look) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    return f'<path d="M{path}" fill="none" stroke="{look.colour}" stroke-width="1.6"{dash}/>'


def _marker(x: float, y: float, look: Look) -> str:
    if not look.form:
        return ""
    places = {"x": x, "y": y, "l": x - 4, "m": x + 4, "t": y - 4, "b": y + 4, "L": x - 11, "M": x + 11, "r": 4}
    path = FORMS[look.form].format(**{name: f"{value:.1f}" for name, value in places.items()})
    fill = "#ffffff" if look.hollow else "none" if look.form in ("cross", "dash") else look.colour
    thick = '3" opacity="0.5' if look.form == "dash" else "1.6"
    return f'<path d="{path}" fill="{fill}" stroke="{look.colour}" stroke-width="{thick}"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{html.escape(words)}</text>'


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten, or the powers alone where these would be many; around all values."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        tens = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        every = [s * 10.0**e for e in tens for s in steps]
        first = max(i for i, v in enumerate(every) if v <= low)
        last = min(i for i, v in enumerate(every) if v >= high)
        found = [float(f"{v:.6g}") for v in every[first : max(last, first + 1) + 1]]
        if len(found) <= 8:
            break
    return found


def even_ticks(high: float) -> list[float]:
    """From 0 on, about five."""
    step = next(s * 10.0**e for e in range(-9, 12) for s in (1, 2, 5) if s * 10.0**e * 6 >= high)
    return [float(f"{i * step:.6g}") for i in range(math.ceil(high / step - 1e-9) + 1)]
