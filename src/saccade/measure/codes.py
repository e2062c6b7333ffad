"""Maps as one byte a cell, which makes them small enough to lie in a page and in a run's folder."""

from __future__ import annotations

import math

# of a mass, steps of a logarithm: from a hundred thousandth to the whole
NO_PAIRS, WHOLE_MASS, STEPS_PER_DECADE = 255, 250, 50


def share_code(share: float) -> int:
    """Whole per cents; NaN is a cell without pairs."""
    return NO_PAIRS if math.isnan(share) else round(100 * share)


def mass_code(mass: float, share: float) -> int:
    """Of a mass, in a cell of which `share` was chosen; NaN is a cell without pairs."""
    if math.isnan(share):
        return NO_PAIRS
    return max(0, WHOLE_MASS + round(STEPS_PER_DECADE * math.log10(mass))) if mass > 0 else 0
