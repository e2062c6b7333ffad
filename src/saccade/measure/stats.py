"""Intervals, paired differences and power. Plain functions of numbers; nothing here knows of models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from saccade.core.errors import BadOption
from saccade.core.rng import seed_of

ALPHA, POWER = 0.05, 0.8
DRAWS = 4000  # bootstrap resamples
BOOTSTRAP_FROM = 10  # samples
NORMAL = NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; `sd` is the deviation of one sample, `smallest_effect` what n of them could show."""

    n: int
    mean: float
    low: float
    high: float
    sd: float
    smallest_effect: float


def mean_interval(values: Sequence[float], alpha: float = ALPHA) -> Estimate:
    """Mean of real numbers, with its interval: Student's below ten samples, from there on by bootstrap.

    The plain percentile interval is too short by sqrt((n-1)/n) z/t; taking the percentiles at
    Phi(+-sqrt(n/(n-1)) t) mends that, but of a handful of samples no resampling reaches beyond the extremes.
    Source: Hesterberg 2015, What teachers should know about the bootstrap, 2.3.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        mean = float(x.mean()) if len(x) else math.nan
        wide = math.inf if len(x) < 2 else 0.0
        return Estimate(len(x), mean, mean - wide, mean + wide, 0.0, wide)
    n, sd, t = len(x), float(x.std(ddof=1)), t_quantile(1 - alpha / 2, len(x) - 1)
    if n < BOOTSTRAP_FROM:
        low, high = x.mean() - t * sd / math.sqrt(n), x.mean() + t * sd / math.sqrt(n)
    else:
        draw = np.random.default_rng(seed_of("bootstrap", n)).integers(0, n, (DRAWS, n))
        share = NORMAL.cdf(-math.sqrt(n / (n - 1)) * t)
        low, high = np.quantile(x[draw].mean(1), [share, 1 - share])
    return Estimate(n, float(x.mean()), float(low), float(high), sd, smallest_effect(n, sd, alpha))


def hit_rate(values: Sequence[float], alpha: float = ALPHA) -> Estimate:
    """Share of ones among zeros and ones, with Wilson's interval. Source: Wilson 1927."""
    n, hits = len(values), sum(values)
    if not n:
        return Estimate(0, math.nan, math.nan, math.nan, 0.0, math.inf)
    z, p = NORMAL.inv_cdf(1 - alpha / 2), hits / n
    centre, width = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    smoothed = (hits + 1) / (n + 2)
    sd = math.sqrt(smoothed * (1 - smoothed))
    return Estimate(n, p, (centre - width) / scale, (centre + width) / scale, sd, smallest_effect(n, sd, alpha))


def paired(values: Sequence[float], base: Sequence[float], hits: bool, alpha: float = ALPHA) -> Estimate:
    """Mean of values - base over the same samples, with its interval: bootstrap, or for hits `paired_hits`."""
    assert len(values) == len(base), "paired differences need the same samples"
    difference = [a - b for a, b in zip(values, base)]
    return paired_hits(difference, alpha) if hits else mean_interval(difference, alpha)


def paired_hits(differences: Sequence[float], alpha: float = ALPHA) -> Estimate:
    """Difference of two hit rates over the same samples; each difference is -1, 0 or 1.

    Half an observation is added to each of the four cells of the table, so the interval has a width even when no sample
    disagreed. Source: Agresti and Min 2005, Simple improved confidence intervals for comparing matched proportions.
    """
    n = len(differences)
    if not n:
        return Estimate(0, math.nan, math.nan, math.nan, 0.0, math.inf)
    gained, lost = sum(d > 0 for d in differences) + 0.5, sum(d < 0 for d in differences) + 0.5
    total = n + 2
    centre = (gained - lost) / total
    sd = math.sqrt((gained + lost) / total - centre**2)
    width = NORMAL.inv_cdf(1 - alpha / 2) * sd / math.sqrt(total)
    low, high = max(-1.0, centre - width), min(1.0, centre + width)
    return Estimate(n, sum(differences) / n, low, high, sd, smallest_effect(n, sd, alpha))


# --- power ------------------------------------------------------------------------------------------------------------


def smallest_effect(n: int, sd: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest mean difference that n paired samples of deviation `sd` show with probability `power`.

    (t_{1-alpha/2} + t_{power}) sd / sqrt(n), with n - 1 degrees of freedom.
    """
    if n < 2:
        return math.inf
    return (t_quantile(1 - alpha / 2, n - 1) + t_quantile(power, n - 1)) * sd / math.sqrt(n)


def samples_needed(effect: float, sd: float, alpha: float = ALPHA, power: float = POWER) -> int:
    """The smallest n whose `smallest_effect` is at most `effect`.

    Raises:
        BadOption: an effect or a deviation that is not above zero.
    """
    for name, value in (("effect", effect), ("sd", sd)):
        if not (math.isfinite(value) and value > 0):
            raise BadOption(f"{name}={value!r}", "it must be above zero", "Give the difference that you want to see.")
    low, high = 1, 2
    while smallest_effect(high, sd, alpha, power) > effect:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if smallest_effect(middle, sd, alpha, power) > effect:
            low = middle
        else:
            high = middle
    return high


def difference_sd(sd: float, correlation: float = 0.5) -> float:
    """Deviation of a paired difference from that of one sample: sd sqrt(2 (1 - correlation))."""
    return sd * math.sqrt(2 * (1 - correlation))


def finite(value: float) -> float | None:
    """A number that JSON has; None for infinity and for none at all."""
    return value if math.isfinite(value) else None


def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t with a whole number of degrees of freedom."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    high = 1.0
    while t_cdf(high, df) < p:
        high *= 2
    return _root(lambda t: t_cdf(t, df) - p, 0.0, high)


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) by the finite sums over cos^k(theta), theta = atan(t / sqrt(df)).

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4. Above 200 degrees Fisher's expansion takes over (26.7.8).
    """
    if df > 200:
        return NORMAL.cdf(t * (1 - 1 / (4 * df)) / math.sqrt(1 + t * t / (2 * df)))
    theta = math.atan(t / math.sqrt(df))
    cos2, odd = math.cos(theta) ** 2, df % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(df // 2):
        total += term
        term *= cos2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return 0.5 + inside / 2


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


# --- times ------------------------------------------------------------------------------------------------------------


def median_spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the lowest and highest of repeated timings."""
    return {"median": float(np.median(values)), "low": float(min(values)), "high": float(max(values))}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """p of the power law y = a x^p that lies nearest in the logarithms, all points weighed alike."""
    x, y = np.log(np.asarray(points, dtype=np.float64)).T
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def crossover(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The length from which a method is faster: where its time over that of full falls below 1 and stays there.

    Linear between measured lengths, in the logarithm of the length. None: not within the lengths that were measured.
    """
    points = sorted(zip(lengths, ratios))
    if not points or points[-1][1] >= 1:
        return None
    for (n0, r0), (n1, r1) in reversed(list(itertools.pairwise(points))):
        if r0 >= 1:
            share = (r0 - 1) / (r0 - r1)
            return math.exp(math.log(n0) + share * (math.log(n1) - math.log(n0)))
    return float(points[0][0])
