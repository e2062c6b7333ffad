"""compare and report: the line that repeats a run is read back as the same run."""

from __future__ import annotations

import json
import shlex

from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import tasks
from saccade.cli import compare, main, parser
from saccade.measure.config import Config
from saccade.measure.contestants import of_families
from saccade.models.loading import DTYPES

TASKS = st.builds(str.__add__, st.sampled_from(tasks.list_tasks()), st.sampled_from(["", "=7"]))
METHODS = ["snapkv", "snapkv:window_tokens=16,pooling=avg", "minference+snapkv", "hip:rep=oracle", "random:part=decode"]
BUDGETS = st.one_of(
    st.floats(0.001, 1.0), st.integers(1, 9999).map("{}tok".format), st.sampled_from(["25%", "1.5MiB", "1"])
)


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


@st.composite
def requests(draw: st.DrawFn) -> dict:
    """Anything that `Config.of` takes, but for a model's path: that is not written down."""
    some = {
        "methods": maybe(st.lists(st.sampled_from(METHODS), max_size=3, unique=True)),
        "budgets": maybe(st.lists(BUDGETS, min_size=1, max_size=3)),
        "tasks": st.lists(TASKS, min_size=1, max_size=3, unique_by=lambda spec: spec.partition("=")[0]),
        "tokens": maybe(st.integers(1, 9999)),
        "lengths": maybe(st.lists(st.integers(32, 9999), max_size=3)),
        "count": maybe(st.integers(1, 99)),
        "rounds": maybe(st.integers(1, 9)),
        "dtype": maybe(st.sampled_from(sorted(DTYPES))),
        "device": st.sampled_from(["cpu", "cuda", "cuda:1"]),
        "quick": st.booleans(),
        "seed": st.integers(0, 99),
        "families": st.lists(st.sampled_from(["sparse", "cache", "decode"]), max_size=2, unique=True),
        "model": st.sampled_from(["smollm2", "owner/some-model"]),
    }
    request = {name: draw(strategy) for name, strategy in some.items()}
    there = of_families(request["families"])
    return request | {"without": draw(st.lists(st.sampled_from(there), max_size=2, unique=True)) if there else []}


@given(requests())
@settings(max_examples=40)
def test_the_line_that_repeats_a_run_is_read_back_as_that_run(request):
    config = Config.of(**request)
    saccade, verb, *given = shlex.split(config.command())
    assert (saccade, verb) == ("saccade", "compare")
    again = Config.of(**compare.request(parser("compare").parse_args(given)))
    assert again == config and again.name == config.name


def test_families_are_words_or_parted_by_commas(capsys):
    def asked(*words: str) -> list[str]:
        return compare.request(parser("compare").parse_args(["--family", *words]))["families"]

    assert asked("cache,decode") == asked("cache", "decode") == asked("cache,", "decode") == ["cache", "decode"]
    assert main(["compare", "--plan", "--family", ","]) == 2
    assert "no family to compare ','" in capsys.readouterr().err


def test_the_plan_comes_alone_and_computes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["compare", "--plan", "--tasks", "loss", "--methods", "snapkv", "--quick"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "loss" in out and "Will take: " in out and " cells, about " in out
    assert main([*given, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cells"] == sum(row["cells"] for row in plan["rows"]) and plan["minutes"] > 0
    assert not list(tmp_path.iterdir())


def test_the_plan_for_a_gpu_says_that_its_time_is_unknown(capsys):
    assert main(["compare", "--plan", "--device", "cuda", "--tasks", "loss", "--methods", "snapkv", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "cells, a time unknown on cuda: costs are recorded of CPUs only" in out and "min" not in out


def test_a_run_ends_with_tables_and_a_page_and_the_same_command_resumes_it(tiny, capsys, tmp_path):
    given = ["compare", "--model", tiny, "--methods", "knorm", "--budgets", "0.5", "--tasks", "continuation-loss"]
    given += ["--tokens", "64", "--count", "2", "--lengths", "--out", str(tmp_path / "run")]
    assert main(given) == 0
    out, err = capsys.readouterr()
    assert "knorm" in out and out.endswith(f"Report: {tmp_path / 'run' / 'report.html'}\n")
    assert err.index("Will take: ") < err.index("loading ") < err.index("Repeat: saccade compare --model ")
    page = (tmp_path / "run" / "report.html").read_text()
    cells = {p: p.read_bytes() for p in (tmp_path / "run" / "cells").glob("*.json")}
    assert main([*given, "--json"]) == 0
    out, err = capsys.readouterr()
    assert " cells are finished already" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run" / "cells").glob("*.json")} == cells
    found = json.loads(out)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found.pop("folder") == str(tmp_path / "run") and found.pop("report").endswith("report.html")
    assert found == summary
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n" and (tmp_path / "page.html").read_text() == page
    assert main(["report", str(tmp_path / "run"), "--format", "terminal"]) == 0
    assert "knorm" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run"), "--format", "pdf"]) == 2
    assert "no such format" in capsys.readouterr().err


def test_a_failed_cell_makes_the_answer_a_no(tiny, capsys, tmp_path, monkeypatch):
    from saccade.methods.cache.knorm import KNorm

    def broken(*_):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(KNorm, "score", broken)
    given = ["compare", "--model", tiny, "--methods", "knorm", "--budgets", "0.5", "--tasks", "continuation-loss"]
    assert main([*given, "--tokens", "64", "--count", "1", "--lengths", "--out", str(tmp_path / "run"), "-q"]) == 1
    assert "1 cells failed; the same command tries them again." in capsys.readouterr().err
