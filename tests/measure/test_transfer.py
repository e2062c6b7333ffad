"""How each cell stands to random: by the strictest of those beside it, by samples, and said where there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.measure import stats
from tests.measure.test_summary import line, summary

PARTS = {"evict": "cache", "prefill": "prefill", "decode": "decode"}


def chance(part: str, task: str, scores, budget: str = "0.25"):
    """A line of random in that part."""
    label = "random" if part == "evict" else f"random:part={part}"
    return line(label, task, scores, budget=budget) | {"method": "random", "part": PARTS[part], "baseline": True}


def method(task: str, scores, part: str = "cache", budget: str = "0.25"):
    """A line of a method."""
    return line("x", task, scores, budget=budget) | {"part": part}


def cell(found, label: str = "x", budget: str = "0.25"):
    return next(c for c in found["transfer"] if (c["label"], c["budget"]) == (label, budget))


losses = st.lists(st.floats(0.5, 9), min_size=5, max_size=5)
hits = st.lists(st.sampled_from([0.0, 1.0]), min_size=5, max_size=5)


@pytest.mark.parametrize("task", ["loss", "passkey"])
@given(data=st.data())
def test_it_is_worse_where_the_mean_is_and_surely_so_where_the_interval_says_it(task, data):
    full, mine, other = (data.draw(losses if task == "loss" else hits) for _ in range(3))
    found = cell(summary(line("full", task, full), method(task, mine), chance("evict", task, other)))
    apart = stats.paired(mine, other, task == "passkey")
    gap = found["random"]
    assert gap == {"label": "random", "diff": apart.mean, "diff_low": apart.low, "diff_high": apart.high}
    better = -apart.mean if task == "loss" else apart.mean
    sure = apart.low > 0 if task == "loss" else apart.high < 0
    assert found["standing"] == ("not below" if better >= 0 else "below" if sure else "lower")


@given(st.permutations([2.0, 3.0, 4.0]), st.sampled_from(["prefill+cache", "prefill+decode", "cache+decode"]))
def test_of_several_parts_the_random_that_does_best_counts(means, part):
    full, steps = [1.0, 1.5, 1.2, 1.1], [0.0, 0.1, 0.2, 0.15]
    lines = {p: chance(p, "loss", [m + s for s in steps]) for p, m in zip(PARTS, means)}
    found = cell(summary(line("full", "loss", full), method("loss", [3.5 + s for s in steps], part), *lines.values()))
    mine = {lines[p]["label"]: m for p, m in zip(PARTS, means) if PARTS[p] in part.split("+")}
    best = min(mine, key=mine.__getitem__)
    assert found["random"]["label"] == best and found["random"]["diff"] == pytest.approx(3.5 - mine[best])
    assert found["standing"] == ("below" if mine[best] < 3.5 else "not below")


@pytest.mark.parametrize(
    "part, other, there",
    [
        ("packing", {"part": "evict"}, True),
        ("cache", {"part": "decode"}, False),
        ("cache", {"part": "evict", "budget": "0.5"}, False),
    ],
)
def test_random_counts_in_the_same_part_at_the_same_budget(part, other, there):
    options = {"task": "loss", "scores": [1.0, 1.0], **other}
    found = cell(summary(line("full", "loss", [1.0, 2.0]), method("loss", [2.0, 2.5], part), chance(**options)))
    assert (found["standing"] == "no random") != there and (found["random"] is None) != there


def test_full_and_random_are_what_others_are_held_against():
    found = summary(line("full", "loss", [1.0, 2.0]), chance("evict", "loss", [3.0, 4.0]))
    assert [c["standing"] for c in found["transfer"]] == ["baseline", "baseline"]
    assert [c["diff"] for c in found["transfer"]] == [0, 2]


def test_one_sample_is_sure_of_nothing():
    found = cell(summary(line("full", "loss", [1.0]), method("loss", [9.0]), chance("evict", "loss", [2.0])))
    assert found["standing"] == "lower" and found["random"]["diff_low"] is None
