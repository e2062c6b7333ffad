"""new and check: a scaffold runs as it is, in a source checkout and as a package; check says what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saccade.cli import check, main, tree

ROOT = Path(__file__).parents[2]


def saccade(*given: str, source: Path, more: Path | None = None) -> tuple[int, list[dict] | str]:
    """A fresh process on a source tree, and a folder beside it as if it were installed."""
    path = os.pathsep.join(map(str, [source / "src", *([more] if more else [])]))
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "saccade", *given], env=environ, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout) if "--json" in given else done.stdout


def states(found: list[dict]) -> dict[str, str]:
    return {row["what"]: row["state"] for row in found}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A checkout to write into, without the conformance tests: those are slow."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("src", "tests/methods"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, root / name)
    return root


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("sparse", "decode")]  # three processes with torch


@pytest.mark.parametrize("family", ["cache", *SLOW])
def test_in_a_checkout_only_what_is_marked_is_missing(family, copy):
    code, written = saccade("new", f"my-{family}", "--family", family, source=copy)
    files = [Path(line) for line in written.splitlines()]
    assert code == 0 and all(f.is_file() and f.stem.endswith(f"my_{family}") for f in files) and len(files) == 3
    code, found = saccade("check", f"my-{family}", "--json", source=copy)
    assert code == 1
    assert states(found) == {
        "card": "ok",
        "TODO marks": "todo",
        "own tests": "ok",
        "conformance": "-",
        "smoke claim": "ok",
    }
    for file in files:
        file.write_text(file.read_text().replace("TODO", "Done"))
    assert check._todo("", tree.Files(*files)) == ("ok", "none left")
    code, shown = saccade("show", f"my-{family}", source=copy)
    assert code == 0 and f"my-{family}: Done the paper's title" in shown
    ruff = [sys.executable, "-m", "ruff", "check", *files]
    assert subprocess.run(ruff, cwd=copy, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_package_of_its_own_registers_through_its_entry_point(tmp_path):
    code, written = saccade("new", "far-away", "--family", "cache", "--into", str(tmp_path), source=ROOT)
    assert code == 0 and len(written.splitlines()) == 5
    project = (tmp_path / "pyproject.toml").read_text()
    entry = project.partition('[project.entry-points."saccade.methods"]\n')[2].splitlines()[0].replace('"', "")
    assert entry == "far-away = saccade_far_away.far_away:FarAway"
    info = tmp_path / "saccade_far_away-0.1.0.dist-info"  # what pip would have left
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saccade-far-away\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[saccade.methods]\n{entry}\n")
    code, found = saccade("list", "far-*", "--json", source=ROOT, more=tmp_path)
    assert code == 0 and found["methods"][0]["family"] == "cache"
    (tmp_path / "tests" / "test_far_away.py").write_text("def test_no():\n    assert False\n")
    (tmp_path / "saccade_far_away" / "far_away_claim.py").unlink()
    code, found = saccade("check", "far-away", "--json", source=ROOT, more=tmp_path)
    assert code == 1
    wrong = {row["what"]: row["found"] for row in found if row["state"] == "fail"}
    assert "1 failed" in wrong["own tests"] and wrong["smoke claim"].startswith("there is no ")
    code, _ = saccade("new", "far-away-2", "--family", "cache", "--into", str(tmp_path), source=ROOT)
    assert code == 3  # the pyproject.toml is there already, and stays
    assert (tmp_path / "pyproject.toml").read_text() == project


@pytest.fixture
def steps(monkeypatch):
    """Without pytest inside pytest."""
    monkeypatch.setattr(check, "_pytest", lambda target, more: ("ok", " ".join([target.name, *more])))


def test_what_a_card_lacks_is_said(steps, monkeypatch, capsys):
    bare = {"title": "", "budget": "", "paper": "", "authors": "", "summary": "x", "baseline": False, "name": "hip"}
    monkeypatch.setattr(check.registry, "card", lambda name: type("Card", (), bare))
    monkeypatch.setattr(check.registry, "get", lambda name: type("Hip", (), {"__doc__": "No source."}))
    state, words = check._card("hip", tree.files("hip"))
    assert (state, words) == ("fail", "it lacks title, budget, paper, authors, the docstring's line `Source:`")


def test_a_claim_whose_machinery_fails_is_said(tmp_path):
    claim = tmp_path / "claim.py"
    claim.write_text(
        "from saccade.claims._contract import Check, Evidence\n"
        "def measure(tier, progress):\n"
        "    return Evidence([Check('share used', 0.7, 0.7, 0.7, 0.5, False)], tier)\n"
    )
    at = tree.Files(claim, claim, claim)
    assert check._claim("x", at) == ("fail", "not reproduced; share used: 0.7, bar 0.5")


def test_a_finished_method_passes(steps, capsys):
    assert main(["check", "knorm"]) == 0
    out = capsys.readouterr().out
    assert "test_knorm.py" in out and "conformance --method knorm" in out and "none left" in out
