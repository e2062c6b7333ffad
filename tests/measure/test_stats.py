"""Intervals cover what they claim, power is the inverse of itself, the quantiles are Student's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from saccade.core.errors import BadOption
from saccade.core.rng import seed_of
from saccade.measure import stats

reals = st.floats(-1e3, 1e3, allow_nan=False)


@pytest.mark.parametrize("df, quantile", [(1, 12.7062), (2, 4.30265), (7, 2.364624), (30, 2.042272), (400, 1.965912)])
def test_t_quantile_is_that_of_the_tables(df, quantile):
    assert stats.t_quantile(0.975, df) == pytest.approx(quantile, rel=1e-5)


@given(st.floats(0.01, 0.99), st.integers(1, 300))
def test_t_quantile_inverts_t_cdf_and_is_odd(p, df):
    assert stats.t_cdf(stats.t_quantile(p, df), df) == pytest.approx(p, abs=1e-9)
    assert stats.t_quantile(p, df) == pytest.approx(-stats.t_quantile(1 - p, df), abs=1e-9)


@given(st.lists(reals, min_size=2, max_size=30), reals)
def test_mean_lies_in_its_interval_and_moves_with_the_data(values, shift):
    one, moved = stats.mean_interval(values), stats.mean_interval([v + shift for v in values])
    assert one.low <= one.mean + 1e-9 and one.mean - 1e-9 <= one.high
    assert moved.low - one.low == pytest.approx(shift, abs=1e-6)


@given(st.lists(reals, min_size=2, max_size=30))
def test_differences_to_itself_are_nothing(values):
    apart = stats.paired(values, values, hits=False)
    assert (apart.mean, apart.low, apart.high, apart.sd) == (0, 0, 0, 0)


@pytest.mark.parametrize("n", [2, 6, 12, 40])
def test_interval_covers_the_mean(n):
    draw = np.random.default_rng(seed_of("test/coverage", n))
    found = [stats.mean_interval(list(draw.normal(1.0, 2.0, n))) for _ in range(300)]
    covered = np.mean([e.low <= 1.0 <= e.high for e in found])
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300) - 0.01 <= covered  # one point: the bootstrap is not exact


@pytest.mark.parametrize("p", [0.5, 0.9, 1.0])
def test_wilson_covers_the_rate(p):
    draw = np.random.default_rng(seed_of("test/wilson", p))
    found = [stats.hit_rate(list(map(float, draw.random(20) < p))) for _ in range(400)]
    assert np.mean([e.low <= p + 1e-12 <= e.high + 1e-9 for e in found]) > 0.91


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=40))
def test_paired_hits_never_claim_certainty(differences):
    apart = stats.paired_hits(differences)
    assert -1 <= apart.low < apart.high <= 1
    flipped = stats.paired_hits([-d for d in differences])
    assert (apart.low, apart.high) == pytest.approx((-flipped.high, -flipped.low))


def test_paired_hits_sees_a_real_loss_and_no_other():
    assert stats.paired_hits([-1.0] * 8 + [0.0] * 4).high < 0
    assert stats.paired_hits([-1.0] + [0.0] * 11).high > 0


@given(st.floats(0.01, 3.0), st.floats(0.01, 1.0), st.floats(0.6, 0.95))
def test_samples_needed_is_the_least_that_suffices(effect, sd, power):
    n = stats.samples_needed(effect, sd, power=power)
    assert stats.smallest_effect(n, sd, power=power) <= effect
    assert n == 2 or stats.smallest_effect(n - 1, sd, power=power) > effect


def test_power_is_what_it_says():
    n = stats.samples_needed(0.5, 1.0)
    draw = np.random.default_rng(seed_of("test/power"))
    x = draw.normal(0.5, 1.0, (2000, n))
    t = x.mean(1) / (x.std(1, ddof=1) / math.sqrt(n))
    assert np.mean(t > stats.t_quantile(0.975, n - 1)) == pytest.approx(stats.POWER, abs=0.04)


def test_a_yes_no_task_needs_what_the_books_say():
    # deviation 0.5, correlation 0.5: about 1.4 / sqrt(n)
    sd = stats.difference_sd(0.5, 0.5)
    assert stats.smallest_effect(500, sd) == pytest.approx(1.4 / math.sqrt(500), rel=0.02)


@pytest.mark.parametrize("effect, sd, name", [(0.0, 1.0, "effect=0.0"), (-1.0, 1, "effect=-1.0"), (0.1, 0.0, "sd=0.0")])
def test_an_effect_of_nothing_cannot_be_seen(effect, sd, name):
    with pytest.raises(BadOption, match=rf"{name}: it must be above zero"):
        stats.samples_needed(effect, sd)


@given(st.floats(1.1, 50), st.floats(0.3, 0.95), st.integers(5, 12))
def test_crossover_finds_where_two_costs_meet(fixed, share, steps):
    """A method of time fixed*1000 + share*n against n: they meet at fixed*1000/(1-share)."""
    meet = 1000 * fixed / (1 - share)
    lengths = [int(meet * 2 ** (i - steps / 2)) for i in range(steps)]
    assume(len(set(lengths)) == steps)
    found = stats.crossover(lengths, [(1000 * fixed + share * n) / n for n in lengths])
    assert found == pytest.approx(meet, rel=0.15)


def test_crossover_outside_of_what_was_measured():
    assert stats.crossover([512, 1024], [1.5, 1.1]) is None
    assert stats.crossover([512, 1024], [0.9, 0.8]) == 512
    assert stats.crossover([256, 512, 1024], [0.9, 1.2, 0.6]) > 512, "faster once and slower again is not yet faster"


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9))
def test_median_lies_within_its_spread(times):
    found = stats.median_spread(times)
    assert found["low"] <= found["median"] <= found["high"]
