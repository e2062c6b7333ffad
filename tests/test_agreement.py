"""benchmarks/agreement/run.py: what is made of two implementations' answers; the peers themselves are not here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.measure.contestants import parse

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "agreement.md"


def loaded():
    spec = importlib.util.spec_from_file_location("saccade_agreement", ROOT / "benchmarks" / "agreement" / "run.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


run = loaded()
numbers = st.lists(st.integers(-3, 3), min_size=2, max_size=9)


def place(x, i):
    """The mean place of x[i] among all, counted one by one."""
    return sum(y < x[i] for y in x) + (sum(y == x[i] for y in x) - 1) / 2


@given(numbers)
@settings(max_examples=20, deadline=None)
def test_ranks_are_counted_places(x):
    assert run.ranks(torch.tensor([x]).float())[0].tolist() == [place(x, i) for i in range(len(x))]


@given(st.permutations(range(7)))
@settings(max_examples=20, deadline=None)
def test_rank_correlation_is_spearmans(order):
    a, b = torch.arange(7.0), torch.tensor(order).float()
    known = 1 - 6 * float((a - b).square().sum()) / (7 * (49 - 1))
    assert float(run.rank_correlation(a.exp(), b)) == pytest.approx(known)
    assert float(run.rank_correlation(b, -b)) == pytest.approx(-1)


def test_sets_are_the_same_only_where_nothing_is_left_out():
    a, b = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    assert run.shared(a, b).tolist() == [2 / 3, 1]
    assert torch.equal(run.masks([torch.tensor([0, 2]), torch.tensor([], dtype=torch.int32)], 3),
                       torch.tensor([[1, 0, 1], [0, 0, 0]]).bool())  # fmt: skip


def test_contested_keys_are_as_far_apart_as_their_scores():
    scores = torch.tensor([[4.0, 3.0, 2.0], [4.0, 3.0, 2.0], [torch.inf, 3.0, 2.0]])
    a, b = torch.tensor([[1, 1, 0]] * 3).bool(), torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()
    assert run.contested(scores, a, b).tolist() == pytest.approx([1 / 3, 0, 1])


def test_answers_that_say_the_same_do_not_diverge():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    assert float(run.divergence(logits, logits + 3)) == pytest.approx(0, abs=1e-12)
    assert float(run.divergence(logits, logits.flip(-1))) > 0.1


def test_what_is_compared_follows_from_what_there_is():
    pair = run.Pair("snapkv", {}, "a press", "", sure=(1, 1), undo=lambda s: -s)
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0, 0.0]])
    found = run.compared(pair, {"scores": scores}, {"scores": -scores + torch.tensor([5.0, 0, 0, 0, 7])})
    assert found == {"rank": {"mean": 1.0, "least": 1.0, "most": 1.0}}
    kept = torch.tensor([[1, 1, 0]]).bool()
    found = run.compared(pair, {"kept": kept}, {"kept": ~kept, "logits": scores})
    assert found["shared"]["mean"] == found["same"] == 0 and set(found) == {"shared", "same", "kept"}
    both = {"keys": scores, "values": scores}
    assert run.compared(pair, both, {"keys": scores, "values": scores + 1})["alike"]["mean"] == 0.5


@pytest.mark.parametrize("name", run.METHODS)
def test_what_is_compared_is_there(name):
    pairs = run.METHODS[name](run.Plan(512, 0.25))
    assert pairs and all(pair.method == name and pair.why and pair.said for pair in pairs)
    for pair in pairs:
        parse(pair.ours)  # names and options that there are
        assert pair.job.get("steps", pair.steps) >= pair.steps


def test_a_row_is_told_with_its_worst_head():
    row = {"ours": "tova", "peer": "TOVAPress", "rank": run.spread(torch.tensor([0.5, 1.0])),
           "shared": run.spread(torch.ones(3)), "same": 1.0,
           "nats": run.spread(torch.tensor([1e-9, 2e-6]))}  # fmt: skip
    assert run.cells(row) == ("tova", "TOVAPress", "0.7500 (0.5000)", "1.0000", "1.000", "2.0e-06")
    assert run.cells({"ours": "kivi", "peer": "p", "alike": run.spread(torch.ones(1))})[2:] == (
        "–", "numbers alike: 1.0000", "–", "–",
    )  # fmt: skip


def test_methods_measured_again_take_the_place_of_their_rows():
    old = {"tokens": 8, "rows": [{"method": "tova", "n": 1}, {"method": "kivi", "n": 1}]}
    new = {"tokens": 8, "rows": [{"method": "snapkv", "n": 2}, {"method": "tova", "n": 2}]}
    found = run.merged(old, new)["rows"]
    assert [(row["method"], row["n"]) for row in found] == [("snapkv", 2), ("tova", 2), ("kivi", 1)]
    with pytest.raises(SystemExit, match="measured otherwise"):
        run.merged(old, new | {"tokens": 9})


def test_without_the_peers_it_says_how_to_get_them(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.arguments(["--python", str(tmp_path / "python")])
    assert "make the peers' environment" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.arguments(["--markdown", "page.md"])
    assert "--markdown needs --show" in capsys.readouterr().err


def test_the_page_is_up_to_date():
    page = PAGE.read_text("utf-8")
    again = "run: python benchmarks/agreement/run.py --show benchmarks/results --markdown docs/agreement.md"
    assert run.filled(page, run.read(run.RESULTS)) == page, again
