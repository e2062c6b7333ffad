"""Where saccade keeps what it fetched and made. `SACCADE_CACHE` moves it."""

from __future__ import annotations

import os
from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "artefacts"


def cache_dir(*parts: str) -> Path:
    """A folder in the cache; not created here, so that a read-only home hurts only who writes."""
    root = os.environ.get("SACCADE_CACHE") or Path.home() / ".cache" / "saccade"
    return Path(root).joinpath(*parts)
