"""`saccade bench`: ops and methods, why a back end is absent, and this checkout against another commit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from saccade.cli import main, revision
from tests.measure import small

SMALL = ["--lengths", "64", "160", "--heads", "4", "2", "16", "--rounds", "2", "--dtype", "float32", "-q"]


def test_ops_as_a_table_and_as_json(capsys):
    assert main(["bench", "decode", "page_bounds", *SMALL]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert [line.split()[:3] for line in lines[1:5]] == [
        [op, "torch", n] for op in ("decode", "page-bounds") for n in ("64", "160")
    ]
    assert sum(line.startswith(("decode, decode: ", "page-bounds, prefill: ")) for line in lines) == 2
    assert "Dense: PyTorch's attention" in told.err
    assert main(["bench", "decode", *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["op"], r["tokens"]) for r in found["ops"]] == [("decode", 64), ("decode", 160)]
    assert found["environment"]["threads"] >= 1 and found["failed"] == []


def test_a_method_in_the_whole_model_beside_full(capsys, tmp_path):
    model = small.save(tmp_path / "tiny")
    given = ["bench", "snapkv", "--model", str(model), "--lengths", "64", "--rounds", "1", "--dtype", "float32", "-q"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["label"] for r in found["methods"]} >= {"full", "snapkv"} and found["ops"] == []
    assert [(r["label"], r["stage"]) for r in found["crossover"] if r["label"] == "snapkv"] == [("snapkv", "decode")]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:3] == ["full", "1", "64"] and "snapkv, decode: " in out


def test_layers_by_name_and_methods_with_layer(capsys):
    given = ["--lengths", "32", "48", "64", "--layer-heads", "2", "8", "--rounds", "1", "--budget", "8tok", "-q"]
    assert main(["bench", "landmark:read_blocks=2", *given]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["full", "32"], ["full", "48"]]
    assert "landmark:read_blocks=2: seconds grow as n^" in out and "(3 lengths)" in out
    assert main(["bench", "streaming", "--layer", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["layer"] for r in found["layers"]} == {"full", "streaming"} and found["methods"] == []
    assert main(["bench", "landmark", "--base", "HEAD", *given]) == 2
    assert "landmark: layers are not compared" in capsys.readouterr().err


def test_a_dry_run_lists_every_back_end_with_its_reasons(capsys):
    assert main(["bench", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    listed = {(r["op"], r["back_end"]) for r in rows}
    assert listed >= {("attend", "flex"), ("attend", "flash4"), ("attend", "triton"), ("decode", "torch")}
    assert all(r["runs"] != bool(r["reasons"]) for r in rows)
    assert main(["bench", "attend", "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert "on a CUDA device" in words or "is not installed" in words


@pytest.mark.parametrize("names, words", [(["atend"], "Did you mean"), (["attend", "--lengths", "0"], "lengths [0]")])
def test_what_cannot_be_timed_is_said_first(names, words, capsys):
    assert main(["bench", *names, "-q"]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.out == ""


# --- against a commit -------------------------------------------------------------------------------------------------


def test_red_tests_show_no_gain(capsys, monkeypatch):
    monkeypatch.setattr(revision, "_tests_of_op", lambda root, op: [root / "tests" / "ops" / "there_is_none.py"])
    monkeypatch.setattr(revision, "side_by_side", lambda *_: pytest.fail("it was timed all the same"))
    assert main(["bench", "decode", *SMALL, "--base", "HEAD"]) == 1
    assert "No gain is shown: these tests fail here: there_is_none" in capsys.readouterr().err


def test_without_pytest_no_gain_can_be_shown(capsys, monkeypatch):
    monkeypatch.setattr(revision, "run_tests", lambda *_: None)
    assert main(["bench", "decode", *SMALL, "--base", "HEAD"]) == 3
    assert 'bench --base: pytest is missing. Install it: pip install "saccade[test]"' in capsys.readouterr().err


def test_every_op_with_a_workload_has_tests():
    from saccade.measure.workloads import WORKLOADS

    root = revision._root()
    assert all(revision._tests_of_op(root, op) for op in WORKLOADS)


def test_a_commit_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(revision, "red_tests", lambda *_: [])
    assert main(["bench", "decode", *SMALL, "--base", "no-such-commit"]) == 3
    assert "bench --base no-such-commit: " in capsys.readouterr().err


@pytest.mark.slow
def test_this_checkout_against_its_own_commit(capsys, monkeypatch):
    """Both sides are timed, each from its own files, and nothing of it stays."""
    root = revision._root()
    monkeypatch.setattr(revision, "red_tests", lambda *_: [])
    assert main(["bench", "decode", *SMALL, "--base", "HEAD", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["name"], r["tokens"], r["what"]) for r in rows] == [("decode", 64, "torch"), ("decode", 160, "torch")]
    assert all(r["least"] <= r["ratio"] <= r["largest"] for r in rows)
    listed = subprocess.run(["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True).stdout
    assert len([line for line in listed.splitlines() if Path(line.split()[0]).name == "base"]) == 0
