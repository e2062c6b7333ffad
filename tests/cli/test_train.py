"""train: a table of what was trained, the same as JSON, and from its checkpoints the same again."""

from __future__ import annotations

import json

import saccade.measure.training
from saccade.cli import main

GIVEN = ["train", "--task", "listops", "--mixer", "streaming", "--budget", "4tok", "--seeds", "2", "--steps", "2"]
SIZES = ["--tokens", "16", "--rows", "32", "--channels", "8", "--heads", "2", "--layers", "1"]


def test_a_table_with_the_baselines_and_the_same_as_json(capsys, tmp_path):
    given = [*GIVEN, *SIZES, "--out", str(tmp_path)]
    assert main(given) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "listops, 2 steps of 32 rows, 2 seeds; accuracy, higher is better"
    assert [line.split()[0] for line in lines[1:]] == ["mixer", "full", "streaming", "random"]
    assert "step 1: loss" in err and err.endswith(f"All numbers: {tmp_path / 'summary.json'}\n")
    assert main([*given, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "summary.json").read_text()) and not err


def test_a_baseline_gets_a_verdict(capsys, tmp_path):
    assert main([*GIVEN, *SIZES, "--against", "full", "--out", str(tmp_path), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "" and lines[-2].split() == ["mixer", "against", "better", "by", "low", "high", "ordering"]
    (told,) = json.loads((tmp_path / "summary.json").read_text())["orderings"]
    assert lines[-1].split()[:2] == ["streaming", "full"] and lines[-1].endswith(told["verdict"])


def test_what_is_better_goes_by_the_metric():
    from saccade.cli.train import _against

    assert [_against(0.1, 0.2, True), _against(0.1, 0.2, False)] == ["better", "worse"]
    assert [_against(-0.2, -0.1, True), _against(-0.2, -0.1, False)] == ["worse", "better"]
    assert _against(-0.1, 0.2, True) == _against(None, None, True) == "not to be told apart"


def test_interrupted_it_says_that_it_goes_on(capsys, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(saccade.measure.training, "train", interrupt)
    assert main([*GIVEN, "--out", str(tmp_path)]) == 130
    assert "Checkpoints and finished trainings are kept; the same command resumes." in capsys.readouterr().err


def test_other_processes_than_the_first_say_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(saccade.measure.training, "train", lambda *_, **__: {})
    assert main([*GIVEN, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "")
