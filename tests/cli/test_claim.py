"""claim: shows what was measured, and says no where a paper's claim does not hold."""

from __future__ import annotations

import json

import pytest

from saccade.claims import _found, run
from saccade.claims._sweep import Measurement
from saccade.cli import main
from saccade.core import registry
from saccade.core.errors import CannotRun
from saccade.core.paths import cache_dir
from saccade.measure.environment import sources
from saccade.measure.store import Store

CHECKS = [
    {"name": "ours minus full", "value": -0.0312, "low": -0.1, "high": 0.05, "bar": -0.05, "holds": True},
    {"name": "ours minus random", "value": None, "low": None, "high": None, "bar": 0.3, "holds": False},
]


@pytest.fixture
def measured(monkeypatch, cache):
    """Claims that are found without being measured: verdicts by name. Gives the names that were measured so far."""
    monkeypatch.setattr(_found, "SHIPPED", cache / "none")  # an installed package that has measured nothing
    monkeypatch.setattr(_found, "CHECKOUT", cache)
    asked: list[str] = []

    def install(**verdicts: str | None) -> list[str]:
        def one(name, tier, progress):
            asked.append(name)
            if verdicts[name] == "interrupted":
                raise KeyboardInterrupt
            if verdicts[name] is None:
                raise CannotRun(f"claim {name}", "the measurement broke off", "Nothing is kept.")
            line = {"method": name, "tier": tier, "verdict": verdicts[name], "checks": CHECKS, "says": "It says so."}
            line |= {"where": "table 1", "setting": "one text", "reason": "Short.", "seconds": 3.2, "hardware": "a CPU"}
            return line | {"date": f"2026-01-01T00:00:{len(asked):02}"}

        monkeypatch.setattr(run, "measured", one)
        return asked

    return install


def test_a_claim_is_shown_with_its_checks_and_its_reason(measured, capsys):
    measured(snapkv="in part")
    assert main(["claim", "snapkv"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("snapkv: It says so.\n  table 1; measured here: one text\n")
    first, second = (next(line.split() for line in out.splitlines() if line.startswith(c["name"])) for c in CHECKS)
    assert first[-5:] == ["-0.0312", "-0.1", "0.05", "-0.05", "yes"] and second[-5:] == ["–", "–", "–", "0.3", "no"]
    assert "verdict: in part (tier cpu, 3 s, a CPU)\n  Short.\n" in out


@pytest.mark.parametrize(
    ("verdicts", "code", "shown"),
    [
        ({"snapkv": "reproduced", "hip": "reproduced"}, 0, 2),
        ({"snapkv": "reproduced", "hip": "not reproduced"}, 1, 2),
        ({"snapkv": None, "hip": "not reproduced"}, 3, 1),
    ],
)
def test_only_all_reproduced_is_a_yes_and_one_that_breaks_off_stops_no_other(verdicts, code, shown, measured, capsys):
    measured(**verdicts)
    assert main(["claim", *verdicts, "--tier", "smoke", "--json"]) == code
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == shown
    assert ("CannotRun: claim snapkv: the measurement broke off." in err) == (None in verdicts.values())


def test_all_are_all_that_are_registered(measured, capsys):
    measured(**dict.fromkeys(registry.list_methods(), "reproduced"))
    assert main(["claim", "--all", "--json"]) == 0
    assert [line["method"] for line in json.loads(capsys.readouterr().out)] == registry.list_methods()


def test_a_sweep_that_was_killed_goes_on_and_one_that_ended_starts_anew(measured, capsys):
    given = ["claim", "snapkv", "hip", "quest", "--json"]
    asked = measured(snapkv="reproduced", hip="in part", quest="interrupted")
    assert main(given) == 130
    assert capsys.readouterr().err.endswith("kept; the same command goes on with the others.\n")
    measured(snapkv="in part", hip="in part", quest=None)
    assert main(given) == 3
    out, err = capsys.readouterr()
    assert "2 of 3 cells are finished already" in err and "CannotRun: claim quest: " in err
    assert [x["verdict"] for x in json.loads(out)] == ["reproduced", "in part"]
    assert asked == ["snapkv", "hip", "quest", "quest"]
    assert main(given) == 3 and asked[4:] == ["snapkv", "hip", "quest"]
    assert [x["verdict"] for x in _found.lines("snapkv")] == ["reproduced", "in part"]


def test_what_was_finished_and_not_yet_among_the_results_is_put_there(measured, monkeypatch):
    """The moment between the cell's own file and the line in its method's file."""
    measured(snapkv="reproduced", hip="interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(_found, "append", lambda line: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["claim", "snapkv", "hip"]) == 130 and not _found.lines("snapkv")
    for _ in range(2):
        assert main(["claim", "snapkv", "hip"]) == 130
        assert [x["verdict"] for x in _found.lines("snapkv")] == ["reproduced"]


def test_what_another_process_finished_before_it_was_killed_is_put_among_the_results(measured, monkeypatch):
    """It was killed in that same moment, while this process measured another claim."""
    others = Measurement("hip", "cpu", sources())
    asked, alone = measured(snapkv="reproduced", hip="in part"), run.measured

    def beside(name, tier, progress):
        (folder,) = cache_dir("sweeps").iterdir()
        Store(folder).write({**others.head(), "found": alone("hip", tier, progress), "error": None})
        return alone(name, tier, progress)

    monkeypatch.setattr(run, "measured", beside)
    assert main(["claim", "snapkv", "hip"]) == 1 and asked == ["hip", "snapkv"]
    assert [x["verdict"] for x in _found.lines("hip")] == ["in part"]


def test_what_another_process_is_about_to_put_among_the_results_is_left_to_it(measured, monkeypatch, capsys):
    measured(snapkv="reproduced", hip="in part")
    with monkeypatch.context() as patch:
        patch.setattr(_found, "append", lambda line: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["claim", "snapkv", "hip"]) == 130
    its = Measurement("snapkv", "cpu", sources()).key
    monkeypatch.setattr(Store, "reserve", lambda self, key: key != its)
    monkeypatch.setattr(Store, "release", lambda self, key: None)
    assert main(["claim", "snapkv", "hip", "--json"]) == 1
    assert [x["method"] for x in json.loads(capsys.readouterr().out)] == ["snapkv", "hip"]
    assert not _found.lines("snapkv") and len(_found.lines("hip")) == 1


def test_a_real_one_is_measured_and_kept(capsys, cache, monkeypatch):
    monkeypatch.setattr(_found, "folder", lambda: cache / "claims")
    assert main(["claim", "knorm", "--tier", "smoke", "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line in _found.lines("knorm")
    assert main(["claim", "knorm", "--tier", "huge"]) == 2
    assert "tier='huge'" in capsys.readouterr().err
