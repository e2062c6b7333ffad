"""`claim` from verdict to line: arithmetic, what is kept and where, what is skipped, and every error."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saccade
from saccade.claims import _bench, _found, run
from saccade.claims._contract import Check, Claim, Evidence, plain
from saccade.claims._seeds import surely_above, surely_at_least, surely_at_most
from saccade.core.errors import BadInput, BadOption, CannotRun, UnknownName
from saccade.measure.stats import mean_interval, paired

SAID = Claim(says="s", where="w", setting="t", how="h", counts="c")
numbers = st.floats(-10, 10)


def check(holds: bool, value: float = 0.5) -> Check:
    return Check("x", value, value, value, 0.0, holds)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An installed package: no checkout, a cache of its own."""
    monkeypatch.setattr(_found, "SHIPPED", tmp_path / "package" / "found")
    monkeypatch.setattr(_found, "CHECKOUT", tmp_path)
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def measuring(monkeypatch):
    """Replace the measurement of every claim."""

    def use(measure, said=SAID):
        module = types.SimpleNamespace(CLAIM=said, measure=measure)
        for file in ("snapkv", "duo_attention", "full"):
            monkeypatch.setitem(sys.modules, f"saccade.claims.{file}", module)

    return use


# --- verdicts ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["yes", "unclear", "no"])))
def test_the_verdict_counts_what_holds(words):
    verdict = Evidence([dataclasses.replace(check(w == "yes"), unclear=w == "unclear") for w in words], "").verdict
    if not words:
        assert verdict == "not attempted"
    elif "yes" in words:
        assert verdict == ("reproduced" if set(words) == {"yes"} else "in part")
    else:
        assert verdict == ("unclear" if "unclear" in words else "not reproduced")


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=20), numbers)
def test_a_check_holds_on_its_mean_and_shows_its_interval(pairs, bar):
    found = paired([a for a, _ in pairs], [b for _, b in pairs], False)
    above, below = _bench.at_least("x", found, bar), _bench.at_most("x", found, bar)
    assert above.holds == (found.mean >= bar) and below.holds == (found.mean <= bar)
    assert (above.value, above.low, above.high, above.bar) == (found.mean, found.low, found.high, bar)


@given(st.lists(numbers, min_size=1, max_size=6), numbers)
def test_over_seeds_the_whole_interval_decides(values, bar):
    found = mean_interval(values)
    above, over, below = (f("x", found, bar) for f in (surely_at_least, surely_above, surely_at_most))
    assert above.holds == (found.low >= bar) and over.holds == (found.low > bar) and below.holds == (found.high <= bar)
    assert above.unclear == (found.low < bar <= found.high) and below.unclear == (found.low <= bar < found.high)
    assert over.unclear == (found.low <= bar < found.high)
    nothing = mean_interval([])
    assert not any(f("x", nothing, bar).unclear for f in (surely_at_least, surely_above, surely_at_most))


def test_what_is_not_a_number_holds_nothing():
    with pytest.raises(AssertionError, match="x: what is not a number holds nothing"):
        check(True, math.nan)
    assert not _bench.at_least("x", paired([], [], True), -1.0).holds


@given(st.dictionaries(st.text(), st.one_of(st.floats(), st.integers(), st.text(), st.booleans(), st.none())))
def test_plain_rows_are_json(row):
    back = json.loads(json.dumps(plain(row), allow_nan=False))
    assert back == {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


# --- lines ------------------------------------------------------------------------------------------------------------


def test_a_line_says_what_was_found_on_what(place, measuring):
    measuring(lambda tier, progress: Evidence([check(True)], "here", "because", [{"who": "full", "mean": math.inf}]))
    (line,) = saccade.claim("snapkv", "smoke")
    assert json.loads((place / "cache" / "claims" / "snapkv.jsonl").read_text()) == line
    said = {"method": "snapkv", "tier": "smoke", "verdict": "reproduced", "reason": "because", "setting": "here"}
    assert line | said == line
    assert line["checks"] == [plain(vars(check(True)))]
    assert line["versions"].keys() == {"saccade", "torch", "transformers", "python"}
    assert line["table"] == [{"who": "full", "mean": None}] and line["says"] == "s" and line["where"] == "w"
    assert "cores" in line["hardware"] and line["seconds"] >= 0 and line["seed"] == 0 and line["commit"] is None


def test_a_checkout_keeps_lines_beside_the_claims(place, measuring):
    (place / "pyproject.toml").touch()
    (place / "package").mkdir()
    measuring(lambda tier, progress: Evidence([], ""))
    saccade.claim(["duo_attention"], "cpu")
    (file,) = (place / "package" / "found").iterdir()
    assert file.name == "duo_attention.jsonl" and _found.latest("duo-attention")["verdict"] == "not attempted"


def test_the_commit_of_this_checkout():
    assert run._commit() is None or len(run._commit().removesuffix("+changes")) >= 7


LINE = {"method": "snapkv", "tier": "cpu", "verdict": "in part", "date": "2026-01-02"}


def test_the_newest_counts_and_the_smoke_tier_last(place):
    assert _found.latest("snapkv") is None
    later = {"tier": "smoke", "date": "2026-01-04"}, {"date": "2026-01-03"}, {"date": "2026-01-01"}
    _found.append(LINE | later[0])
    assert _found.latest("snapkv")["tier"] == "smoke"
    for more in ({}, *later[1:]):
        _found.append(LINE | more)
    assert _found.latest("snapkv") == LINE | {"date": "2026-01-03"}


@pytest.mark.parametrize("broken", ['{"method": "snap', "[]", "7", '{"method": "snapkv"}', "\x00\xff", ""])
def test_a_corrupt_line_is_skipped_and_named(place, caplog, broken):
    file = _found.append(LINE)
    with file.open("ab") as out:
        out.write(broken.encode("latin-1"))
    _found.append(LINE | {"date": "2026-01-03"})
    with caplog.at_level(logging.WARNING, "saccade"):
        assert [line["date"] for line in _found.lines("snapkv")] == ["2026-01-02", "2026-01-03"]
    assert [f"{file}, line 2 is skipped: " in r.getMessage() for r in caplog.records] == [True] * bool(broken)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_unknown_tiers_methods_and_claims(place, monkeypatch):
    with pytest.raises(BadOption, match=r"tier='big': there are smoke, cpu, gpu\. Give one of these\."):
        saccade.claim("snapkv", "big")
    with pytest.raises(UnknownName, match="Did you mean 'snapkv'"):
        saccade.claim(["full", "snapk"], "smoke")
    monkeypatch.setattr(run, "__file__", str(place / "run.py"))
    found = r"claim duo-attention: nobody has written down what it claims\. It needs a file duo_attention\.py"
    with pytest.raises(CannotRun, match=found):
        saccade.claim("duo-attention", "smoke")
    assert not (place / "cache").exists()


def test_the_gpu_tier(place, measuring, monkeypatch):
    measuring(None)
    found = r"claim snapkv: it is not measured at tier 'gpu'\. Its tiers are: smoke, cpu\."
    with pytest.raises(CannotRun, match=found):
        saccade.claim("snapkv", "gpu")
    measuring(None, Claim("s", "w", "t", "h", "c", tiers=("gpu",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CannotRun, match=r"tier='gpu': torch sees no CUDA device\. Measure with tier='cpu'\."):
        saccade.claim("snapkv", "gpu")


def test_nowhere_to_keep_it_is_said_before_measuring(place, measuring, monkeypatch):
    measuring(lambda tier, progress: pytest.fail("measured in vain"))
    (place / "cache").write_text("a file where the folder should be")
    with pytest.raises(CannotRun, match=r"keep what a claim finds: .* cannot be written \(.+\)\. Make it writable"):
        saccade.claim("snapkv", "smoke")
    (place / "cache").unlink()
    monkeypatch.setattr(_found.os, "access", lambda path, mode: False)
    with pytest.raises(CannotRun, match=r"cannot be written \(it is read-only\)\. .* name another with SACCADE_CACHE"):
        saccade.claim("snapkv", "smoke")


def test_a_full_disk_is_said(place, monkeypatch):
    monkeypatch.setattr(_found.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CannotRun, match=r"cannot be written \(No space left on device\)"):
        _found.append(LINE)


def test_a_measurement_that_breaks_is_no_verdict(place, measuring):
    measuring(lambda tier, progress: 1 / 0)
    with pytest.raises(CannotRun, match=r"claim full at tier 'smoke': the measurement broke off \(ZeroDivisionError"):
        saccade.claim("full", "smoke")
    measuring(lambda tier, progress: (_ for _ in ()).throw(BadInput("a", "b", "c.")))
    with pytest.raises(BadInput, match=r"a: b\. c\."):
        saccade.claim("full", "smoke")
    assert _found.lines("full") == []
