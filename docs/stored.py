"""The stored results that pages are made of. Called by docs/make.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def newest(name: str) -> tuple[Path, dict[str, Any]]:
    """The latest file of that name, NAME-DEVICE-DATE.json, and what it holds."""
    found = [p for p in RESULTS.glob(f"{name}-*.json") if re.fullmatch(rf"{name}-[^-]+-\d+-\d+-\d+", p.stem)]
    path = max(found, key=lambda p: p.stem[-10:])
    return path, json.loads(path.read_text(encoding="utf-8"))
