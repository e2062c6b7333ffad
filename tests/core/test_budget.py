"""What a budget means, counted by hand; what is none, in words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.core.budget import FULL, Budget
from saccade.core.errors import BadBudget

FRACTIONS = st.floats(0.001, 1.0)
UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
TAKES = r"Give a fraction kept \(0.25 or '25%'\), tokens per head \('4096tok'\) or bytes \('2GiB'\)\."


@given(FRACTIONS)
def test_a_number_and_a_percentage_are_fractions_kept(x):
    assert Budget.of(x) == Budget(x, "fraction") == Budget.of(repr(x))
    assert Budget.of(f"{100 * x!r} %").amount == pytest.approx(x)


@given(st.integers(1, 10**9), st.sampled_from(["tok", "tokens"]))
def test_tokens_are_read(n, unit):
    assert Budget.of(f" {n}{unit} ") == Budget(n, "tokens")


@given(st.integers(1, 1000), st.sampled_from(sorted(UNITS)))
def test_bytes_are_read(n, unit):
    assert Budget.of(f"{n}{unit}") == Budget(n * UNITS[unit], "bytes")


@given(st.one_of(FRACTIONS.map(Budget), st.builds(Budget, st.integers(1, 10**9), st.sampled_from(["tokens", "bytes"]))))
def test_what_is_printed_is_read_back(budget):
    again = Budget.of(str(budget))
    assert again.unit == budget.unit and again.amount == pytest.approx(budget.amount, rel=1e-3)
    assert Budget.of(again) is again


@pytest.mark.parametrize("value", ["", "much", "1.2.3", "5 apples", "--1", None, True, "nan"])
def test_what_is_no_budget_is_refused(value):
    with pytest.raises(BadBudget, match=rf"budget={value!r}: it is no budget\. {TAKES}"):
        Budget.of(value)


@pytest.mark.parametrize("value", [0, 0.0, -1, "0%", "-0.5", "0tok", math.inf, "-1tok"])
def test_what_keeps_nothing_is_refused(value):
    with pytest.raises(BadBudget, match=rf"budget=.*: it keeps nothing\. {TAKES}"):
        Budget.of(value)


def test_less_than_one_token_or_byte_is_refused():
    for unit in ("tokens", "bytes"):
        with pytest.raises(BadBudget, match=rf"budget=0\.5 {unit}: it keeps nothing\. {TAKES}"):
            Budget(0.5, unit)


@pytest.mark.parametrize("value", [1.5, "150%", 4096, "4096"])
def test_a_fraction_above_one_is_refused_and_the_likely_meaning_said(value):
    amount = Budget.of("1").amount * (1.5 if value in (1.5, "150%") else 4096)
    said = rf"a fraction kept cannot exceed 1\. For a number of tokens write '{amount:g}tok'\."
    with pytest.raises(BadBudget, match=said):
        Budget.of(value)


@given(FRACTIONS, st.integers(1, 10**6))
def test_tokens_of_a_fraction_never_exceed_it_nor_vanish(x, n):
    kept = Budget(x).tokens(n)
    assert 1 <= kept <= n
    assert kept == 1 or kept <= x * n + 1e-6 * n
    assert kept + 1 > x * n  # and no token is given away
    assert Budget(x).fraction(n) == x and FULL.tokens(n) == n


@given(st.integers(1, 10**7), st.integers(1, 10**6), st.integers(1, 4096))
def test_tokens_and_bytes_are_cut_to_what_is_there(amount, n, size):
    assert Budget(amount, "tokens").tokens(n) == min(n, amount)
    assert Budget(amount, "bytes").tokens(n, size) == max(1, min(n, amount // size))
    assert Budget(amount, "tokens").fraction(n) == min(n, amount) / n


def test_bytes_need_the_size_of_a_token():
    with pytest.raises(BadBudget, match=r"budget=2048B: the size of one token is not known here\. Give a fraction or"):
        Budget.of("2KiB").tokens(10)


@given(FRACTIONS, st.integers(1, 400))
def test_rows_of_a_causal_pass_spend_at_most_the_share_of_pairs(x, n):
    def pairs(width):
        return sum(min(row, width) for row in range(1, n + 1))

    width, allowed = Budget(x).row_tokens(n), x * n * (n + 1) / 2
    assert width == 1 or pairs(width) <= allowed * (1 + 1e-6)
    assert width == n or pairs(width + 1) > allowed * (1 - 1e-6)
    assert Budget(7, "tokens").row_tokens(n) == min(7, n)


@given(FRACTIONS, st.integers(1, 300), st.integers(1, 8), st.integers(0, 8))
def test_dense_layers_are_paid_for_by_the_others(x, n, layers, dense_layers):
    dense_layers, budget = min(dense_layers, layers - 1), Budget(x)
    kept = [budget.layer_tokens(n, i, layers, dense_layers) for i in range(layers)]
    assert sum(kept) <= max(budget.tokens(n) * layers, layers)
    assert all(1 <= k <= n for k in kept) and len(set(kept[dense_layers:])) == 1
    if len(set(kept)) > 1:
        assert set(kept[:dense_layers]) == {n}


def test_dense_layers_that_nobody_can_pay_for_are_refused():
    said = (
        r"budget=10tok with dense_layers=2: 100 tokens in 2 of 4 layers leave less than one token for each of the"
        r" others\. Give a larger budget or fewer dense layers\."
    )
    with pytest.raises(BadBudget, match=said):
        Budget(10, "tokens").layer_tokens(100, 0, 4, 2)
    assert Budget(0.1).unpaid(4, 2) == ["dense_layers=2 of 4 layers alone exceed budget=0.1; change one of the two"]
    assert Budget(0.6).unpaid(4, 2) == FULL.unpaid(4, 4) == Budget(0.1).unpaid(4, 0) == []
