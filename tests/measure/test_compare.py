"""The main job on a tiny model: files as published, resumed as if never killed, everything said that was left out."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saccade import models
from saccade.core.errors import BadBudget, BadInput, BadOption, CannotRun, UnknownName
from saccade.measure.compare import compare, plan
from saccade.measure.config import Config
from saccade.measure.contestants import of_families
from saccade.measure.program import entrants, everybody
from saccade.methods.cache.knorm import KNorm
from tests.measure import small
from tests.measure.validate import problems, schema

TASKS = ("loss", "continuation-loss", "passkey")
SMALL = {"tasks": TASKS, "tokens": 320, "count": 2, "lengths": (64, 128), "budgets": (0.5, 0.25)}
SMALL |= {"rounds": 2, "dtype": "float32"}
METHODS = ("knorm", "minference+snapkv:window_tokens=8")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("somewhere") / "tiny")


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory):
    """One finished run, and the events it told."""
    events = []
    folder = compare(tiny, METHODS, out=tmp_path_factory.mktemp("runs") / "a", progress=events.append, **SMALL)
    return folder, events


def read(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())


def lines(folder: Path) -> list[dict]:
    """Of the run, in its order."""
    return [json.loads((folder / "cells" / f"{key}.json").read_text()) for key in read(folder, "run")["cells"]]


def stored(folder: Path) -> dict[str, bytes]:
    """All files of cells."""
    return {p.name: p.read_bytes() for p in (folder / "cells").glob("*.json")}


def timeless(value):
    """The same without what a clock says."""
    if isinstance(value, list):
        return [timeless(v) for v in value]
    if not isinstance(value, dict):
        return value
    clocks = ("seconds", "spread", "speedup", "started", "crossover")
    return {k: timeless(v) for k, v in value.items() if not any(c in k for c in clocks)}


def test_every_file_is_as_published(run):
    folder, _ = run
    for name in ("run", "env", "summary"):
        assert problems(read(folder, name), schema(name)) == []
    for line in lines(folder):
        assert problems(line, schema("cell")) == []


def test_everybody_is_compared_on_what_concerns_him(run):
    summary = read(run[0], "summary")
    labels = list(dict.fromkeys(r["label"] for r in summary["rows"]))
    assert labels == ["full", *METHODS, "random", "random:part=prefill", "streaming", "oracle-topk"]
    assert summary["failed"] == [] and summary["missing"] == 0
    assert [(x["label"], x["task"]) for x in summary["not_exercised"]] == [("knorm", "loss"), ("random", "loss")]
    for label in labels[1:]:
        mine = [(r["budget"], r["task"]) for r in summary["rows"] if r["label"] == label]
        tasks = TASKS if label not in ("knorm", "random") else TASKS[1:]
        assert mine == [(b, t) for b in ("0.5", "0.25") for t in tasks]
    assert set(summary["noise"]) == set(TASKS)


def test_budgets_are_kept_and_bytes_follow(run):
    for row in read(run[0], "summary")["rows"]:
        budget = float(row["budget"])
        if row["label"] == "knorm":
            assert budget * 0.97 <= row["kept_fraction"] <= budget
            assert budget <= row["bytes_held"] / row["bytes_full"] < 1.3 * budget
        if row["part"] == "prefill":
            assert row["prefill_density"] <= budget


def test_speed_is_of_full_and_of_what_papers_propose(run):
    summary = read(run[0], "summary")
    assert {r["label"] for r in summary["speed"]} == {"full", *METHODS, "streaming"}
    assert {r["tokens"] for r in summary["speed"]} == {64, 128} and {r["rounds"] for r in summary["speed"]} == {2}
    assert {c["stage"] for c in summary["crossover"]} == {"prefill", "decode"}


def test_what_was_kept_is_drawn_for_methods_that_evict_or_read(run):
    drawn = {x["label"] for x in lines(run[0]) if x.get("kept")}
    assert drawn == {"knorm", METHODS[1], "random", "streaming", "oracle-topk"}


def test_progress_is_told_to_the_end(run):
    folder, events = run
    cells = len(read(folder, "run")["cells"])
    assert [e.kind for e in events][-1] == "end" and events[-1].text == str(folder)
    assert [e.done for e in events if e.kind == "cell"] == list(range(1, cells + 1))


def test_the_same_again_computes_nothing_and_says_the_same(run, tiny):
    folder, _ = run
    before = {p: p.read_bytes() for p in folder.rglob("*.json")}
    events = []
    assert compare(tiny, METHODS, out=folder, progress=events.append, **SMALL) == folder
    assert not [e for e in events if e.kind == "cell"]
    assert {p: p.read_bytes() for p in folder.rglob("*.json")} == before


def test_the_same_seed_gives_the_same_samples(run, tiny, tmp_path):
    again = compare(tiny, METHODS, out=tmp_path / "b", **SMALL)
    assert timeless(lines(again)) == timeless(lines(run[0]))
    assert timeless(read(again, "summary")) == timeless(read(run[0], "summary"))


def test_a_further_budget_computes_only_itself(run, tiny, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(run[0], folder)
    compare(tiny, METHODS, out=folder, **(SMALL | {"budgets": (0.5, 0.25, 0.1)}))
    new = [json.loads(data) for name, data in stored(folder).items() if name not in stored(run[0])]
    assert new and {x["budget"] for x in new} == {"0.1"}


def test_parts_that_were_made_apart_become_one_by_copying_their_cells(run, tiny, tmp_path):
    """What each was asked for is a part of the whole; the whole is asked for at the end, and computes nothing."""
    one, two = (tmp_path / name for name in ("one", "two"))
    part = SMALL | {"lengths": ()}
    compare(tiny, METHODS, out=one, **(part | {"tasks": ["loss"]}))
    compare(tiny, METHODS, out=two, **(part | {"tasks": TASKS[1:]}))
    shutil.copytree(two / "cells", one / "cells", dirs_exist_ok=True)
    events = []
    compare(tiny, METHODS, out=one, progress=events.append, **part)
    assert not [e for e in events if e.kind == "cell"]
    apart, whole = (timeless(read(folder, "summary")) for folder in (one, run[0]))
    assert all(apart[name] == whole[name] for name in ("rows", "transfer", "noise", "breaks", "failed", "missing"))


def test_a_run_from_before_cells_had_files_is_gone_on_with(run, tiny, tmp_path):
    for name in ("run.json", "env.json"):
        (tmp_path / name).write_bytes((run[0] / name).read_bytes())
    texts = [json.dumps(line) + "\n" for line in lines(run[0])]
    (tmp_path / "cells.jsonl").write_text("".join(texts[:-1]) + texts[-1][:50])
    events = []
    compare(tiny, METHODS, out=tmp_path, progress=events.append, **SMALL)
    assert [p.stem for p in (tmp_path / "cells").glob("*.json")] == [lines(run[0])[-1]["key"]]


def test_nothing_says_where_the_model_lay(run, tiny):
    for file in run[0].rglob("*.json"):
        assert str(tiny.parent) not in file.read_text()
    assert read(run[0], "run")["model"] == "tiny"


def test_the_command_says_what_was_asked(run):
    words = shlex.split(read(run[0], "run")["command"])
    assert words[:4] == ["saccade", "compare", "--model", "tiny"]
    asked = " ".join(words)
    assert "--methods knorm minference+snapkv:window_tokens=8 --budgets 0.5 0.25" in asked
    assert "--tokens 320 --count 2 --lengths 64 128 --rounds 2 --dtype float32 --device cpu --seed 0" in asked


def test_methods_without_their_artefact_are_left_out_with_reasons(tiny, tmp_path):
    events = []
    less = {"count": 1, "tasks": ["passkey"], "lengths": ()}
    out = compare(tiny, out=tmp_path / "c", progress=events.append, **(SMALL | less))
    left = {x["label"]: x["reasons"] for x in read(out, "summary")["left_out"]}
    assert "saccade calibrate duo-attention" in " ".join(left["duo-attention"])
    assert any("duo-attention at 0.5, 0.25 is left out: " in e.text for e in events)
    assert "duo-attention" not in {r["label"] for r in read(out, "summary")["rows"]}


def test_a_family_takes_part_as_far_as_it_can_and_the_rest_is_said(tiny, tmp_path):
    small = {"tokens": 64, "count": 1, "budgets": (0.5,), "lengths": (), "dtype": "float32"}
    out = compare(tiny, families=["cache", "decode"], without=["quest"], out=tmp_path / "f",
                  tasks=["continuation-loss"], **small)  # fmt: skip
    summary = read(out, "summary")
    there = {(x["label"], x["budget"]) for x in summary["transfer"]}
    left = {x["label"]: x["reasons"][0] for x in summary["left_out"]}
    assert {("full", "1"), ("random", "0.5"), ("streaming", "0.5"), ("oracle-topk", "0.5"), ("kivi", "1")} <= there
    for name in of_families(["cache", "decode"]):
        assert (name in left) == ((name, "0.5") not in there), name
    assert "saccade calibrate double-sparsity" in left["double-sparsity"] and "it takes no budget" in left["kivi"]
    assert left["quest"] == "that was asked for"
    assert summary["failed"] == [] and problems(summary, schema("summary")) == []
    assert problems(read(out, "run"), schema("run")) == []
    standing = {(x["label"], x["budget"]): x["standing"] for x in summary["transfer"]}
    assert standing["kivi", "1"] == "no random" and standing["h2o", "0.5"] != "no random"


def test_the_oracle_of_long_samples_has_to_be_named(tiny):
    model = models.load(tiny)[0]
    for tokens, methods, there in ((4096, ["knorm"], True), (4097, ["knorm"], False), (4097, ["oracle-topk"], True)):
        config = Config.of(tiny, methods, tokens=tokens, budgets=[0.5, 0.25])
        entries, left_out = entrants(config, model)
        assert [e.who.label for e in entries] == [e.who.label for e in everybody(config)]
        assert ("oracle-topk" in {e.who.label for e in entries}) == there
        why = [(x["label"], x["budgets"], "name it" in x["reasons"][0]) for x in left_out]
        assert why == ([] if there else [("oracle-topk", ["0.5", "0.25"], True)])


def test_a_method_asked_by_name_that_cannot_run_stops_at_once(tiny, tmp_path):
    with pytest.raises(CannotRun, match=r"compare 'duo-attention' on tiny.*saccade calibrate duo-attention"):
        compare(tiny, ["duo-attention"], out=tmp_path / "d", **SMALL)
    assert not (tmp_path / "d").exists()


def test_a_failing_method_is_shown_and_harms_no_other(tiny, tmp_path, monkeypatch):
    def score(self, seen, site):
        raise ValueError("no scores today")

    monkeypatch.setattr(KNorm, "score", score)
    less = SMALL | {"tasks": ["passkey"], "lengths": (64,), "rounds": 1}
    out = compare(tiny, ["knorm", "snapkv"], out=tmp_path / "e", **less)
    summary = read(out, "summary")
    assert {(f["label"], f["text"]) for f in summary["failed"]} == {("knorm", "no scores today")}
    assert problems(summary, schema("summary")) == []
    assert {"full", "snapkv", "random"} <= {r["label"] for r in summary["rows"]}
    monkeypatch.undo()
    compare(tiny, ["knorm", "snapkv"], out=out, **less)
    assert read(out, "summary")["failed"] == []


PROGRAM = """
import sys
from saccade.measure.compare import compare
compare(sys.argv[1], {methods!r}, out=sys.argv[2], **{options!r})
"""


def start(tiny: Path, folder: Path) -> subprocess.Popen:
    """The same comparison in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.format(methods=METHODS, options=SMALL), str(tiny), str(folder)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_killed_at_any_moment_it_ends_with_the_same_summary(run, tiny, tmp_path, number):
    total, target = len(lines(run[0])), tmp_path / "killed"
    kill_at = random.Random(f"{os.getpid()}/{number}").randrange(1, total)
    for turn in range(2):
        process = start(tiny, target)
        done = wait_for(target, kill_at * (turn + 1) // 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert done, "the process ended before it could be killed"
    before = stored(target)
    compare(tiny, METHODS, out=target, **SMALL)
    assert before.items() <= stored(target).items(), "what was finished was computed anew"
    assert len(stored(target)) == total
    assert timeless(read(target, "summary")) == timeless(read(run[0], "summary"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_share_a_folder_and_one_that_is_killed_leaves_its_cell_to_the_others(run, tiny, tmp_path):
    total, target = len(lines(run[0])), tmp_path / "shared"
    processes = [start(tiny, target) for _ in range(3)]
    try:
        assert wait_for(target, total // 3, processes[0])
        processes[0].send_signal(signal.SIGKILL)
        before = stored(target)
        assert [p.wait() for p in processes] == [-signal.SIGKILL, 0, 0]
    finally:
        for process in processes:
            process.kill()
    assert before.items() <= stored(target).items() and len(stored(target)) == total
    assert timeless(read(target, "summary")) == timeless(read(run[0], "summary"))


def wait_for(folder: Path, count: int, process: subprocess.Popen) -> bool:
    """Until there are so many cells; then a little longer, so that the blow falls anywhere in a cell."""
    while process.poll() is None:
        if len(stored(folder)) >= count:
            time.sleep(random.random() * 0.1)
            return True
        time.sleep(0.005)
    return bool(stored(folder))


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, error, words",
    [
        ({"methods": ["snapvk"]}, UnknownName, "Did you mean 'snapkv'"),
        ({"tasks": ["passkeys"]}, UnknownName, "passkeys.*Did you mean"),
        ({"budgets": [0]}, BadBudget, "it keeps nothing"),
        ({"budgets": []}, BadOption, r"budgets=\(\): nothing to compare at\. Give at least one"),
        ({"lengths": [8]}, BadOption, r"lengths=\[8\]: that is too short to be timed\. Give 32 or more"),
        ({"count": 0}, BadOption, r"compare\(\{'count of .*': there is nothing to measure|nothing to measure"),
        ({"tasks": ["passkey=few"]}, BadOption, r"'passkey=few': that is no number of samples\. Say passkey or"),
        ({"rounds": 0}, BadOption, r"compare\(\{'rounds': 0\}\): there is nothing to measure"),
        ({"dtype": "float8"}, BadOption, "dtype 'float8'"),
        ({"tokens": 5000}, BadInput, "compare at 5,000 tokens: tiny was trained for 4,096"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(tiny, tmp_path, asked, error, words):
    with pytest.raises(error, match=words):
        compare(tiny, **({"out": tmp_path / "x"} | SMALL | asked))
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_left_alone(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadOption, match=r"it holds other files and no run\.json"):
        compare(tiny, METHODS, out=tmp_path, **SMALL)
    with pytest.raises(BadOption, match=r"it is a file\. Give a folder"):
        compare(tiny, METHODS, out=tmp_path / "notes.txt", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_full_must_not_fail(tiny, tmp_path, monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("saccade.measure.score.forward", forward)
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(tiny, METHODS, out=tmp_path / "f", **SMALL)


# --- what it will cost ------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a plan loads no model")

    monkeypatch.setattr(models.loading, "load", load)
    monkeypatch.setattr("saccade.measure.planning.CALIBRATION_SECONDS", 0.01)


def test_a_plan_counts_the_cells_of_the_run(run, tiny, nothing_loaded):
    found = plan(tiny, METHODS, **SMALL)
    assert found.cells == len(read(run[0], "run")["cells"]) == sum(r["cells"] for r in found.rows)
    assert found.minutes is None and found.memory_bytes is None, "of a model that is not known"


def test_a_plan_says_minutes_memory_and_download(nothing_loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    known = models.KNOWN["smollm2"]
    found = plan()
    assert found.download_bytes == known.download_bytes and found.disk_bytes == known.needed_bytes
    assert found.minutes > 0 and found.memory_bytes > known.parameters
    assert plan(quick=True).cells < found.cells


def test_a_plan_for_another_device_tells_no_time_of_a_cpu(nothing_loaded, monkeypatch):
    monkeypatch.setattr("saccade.measure.planning.machine_flops", lambda dtype: pytest.fail("it timed the CPU"))
    found = plan(device="cuda:1")
    assert found.minutes is None and found.machine_flops is None and found.device == "cuda:1"
    assert all(row["seconds"] is None for row in found.rows)
    assert found.unknown == "a time unknown on cuda:1: costs are recorded of CPUs only"
    assert found.cells and found.memory_bytes > 2**28


def test_more_work_is_planned_longer(nothing_loaded, monkeypatch):
    monkeypatch.setattr("saccade.measure.planning.machine_flops", lambda dtype: 1e11)
    base = plan(tokens=512, count=2).minutes
    assert plan(tokens=1024, count=2).minutes > base and plan(tokens=512, count=4).minutes > base
    assert plan(tokens=512, count=2, budgets=[0.5]).minutes < base


def test_the_same_request_has_the_same_folder():
    one, two = Config.of(seed=1), Config.of(seed=1)
    assert one.name == two.name != Config.of(seed=2).name
    assert one.timed_budget.amount == 0.25
