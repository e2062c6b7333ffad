"""Maps as small images that lie within the page: a byte a cell, in the colours of the other maps."""

from __future__ import annotations

import base64
import functools
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from plotly.colors import get_colorscale, sample_colorscale

from saccade.measure.codes import NO_PAIRS
from saccade.report.run import Run
from saccade.report.tables import STAGES
from saccade.report.words import say

SCALE = "Cividis"


def image(codes: bytes, wide: int, least: int, most: int) -> str:
    """A PNG as an address: codes from `least` to `most` over the whole scale, cells without pairs see-through."""
    rows = (codes[i : i + wide] for i in range(0, len(codes), wide))
    lines = b"".join(b"\0" + row for row in rows)
    head = struct.pack(">IIBBBBB", wide, len(codes) // wide, 8, 3, 0, 0, 0)
    clear = b"\xff" * NO_PAIRS + b"\0"
    parts = [("IHDR", head), ("PLTE", _palette(least, most)), ("tRNS", clear), ("IDAT", zlib.compress(lines, 9))]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in [*parts, ("IEND", b"")])
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _chunk(name: str, data: bytes) -> bytes:
    body = name.encode() + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


@functools.cache
def _palette(least: int, most: int) -> bytes:
    """256 colours."""
    places = [min(1.0, max(0.0, (code - least) / (most - least))) for code in range(256)]
    colours = sample_colorscale(get_colorscale(SCALE), places, colortype="tuple")
    return bytes(round(255 * part) for colour in colours for part in colour)


def scale() -> str:
    """The colours themselves, for a style sheet."""
    colours = sample_colorscale(get_colorscale(SCALE), 9)
    return f"linear-gradient(to right, {', '.join(colours)})"


# --- the cards of a report --------------------------------------------------------------------------------------------

SHARES, LOGARITHMS = (0, 100), (50, 250)  # codes of a map's ends: of the pairs 0 to 100 %, of the mass 0.01 to 100 %


@dataclass(frozen=True)
class Drawn:
    """Two images of the same queries and keys. `high` rows, `wide` columns."""

    queries: str
    chosen: str
    mass: str
    high: int
    wide: int
    about: str


@dataclass(frozen=True)
class Card:
    """A contestant, and what it attends to in the prompt, after it, or both."""

    label: str
    budget: str
    drawn: list[Drawn]


def cards(run: Run) -> list[Card]:
    """One for each contestant whose maps were made."""
    pictures = run.maps["pictures"] if run.maps else []
    return [Card(p["label"], p["budget"], [_drawn(s) for s in p["stretches"]]) for p in pictures]


def _drawn(stretch: dict[str, Any]) -> Drawn:
    high, wide = stretch["shape"]
    chosen, mass = (base64.b64decode(stretch[name]) for name in ("chosen", "mass"))
    covered, density = (say(stretch[name], "share") for name in ("covered_here", "density_here"))
    about = f"{covered} of the mass on {density} of the pairs"
    pair = image(chosen, wide, *SHARES), image(mass, wide, *LOGARITHMS)
    return Drawn(STAGES[stretch["stage"]], *pair, high, wide, about)
