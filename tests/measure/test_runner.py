"""What is on disk survives: torn and corrupt lines, failing cells, interruptions."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import CannotRun, CorruptResult
from saccade.measure.cells import Cell
from saccade.measure.runner import Event, Results, run_cells, write_json


def cell(number: int) -> Cell:
    return Cell("quality", "m", f"method{number}", "0.5", "loss", 64, 2, 0, "float32", 0, "")


CELLS = [cell(i) for i in range(5)]


def run(folder: Path, work=lambda c: {"value": c.label}, cells=CELLS) -> tuple[Results, list[Event]]:
    events: list[Event] = []
    results = Results(folder / "cells.jsonl")
    run_cells(cells, work, results, lambda c: 1.0, events.append)
    return results, events


def test_every_field_of_a_cell_changes_its_key():
    base = cell(0)
    for name, value in vars(base).items():
        other = "speed" if name == "kind" else value + 1 if isinstance(value, int) else value + "x"
        assert Cell(**(vars(base) | {name: other})).key != base.key
    assert cell(0).key == base.key


def test_a_finished_cell_is_not_run_again(tmp_path):
    run(tmp_path, cells=CELLS[:3])
    asked = []
    results, events = run(tmp_path, lambda c: asked.append(c) or {})
    assert asked == CELLS[3:] and set(results.lines) == {c.key for c in CELLS}
    assert events[0].text == "3 of 5 cells are finished already"


def test_a_result_is_on_disk_before_the_next_cell_begins(tmp_path):
    seen = []
    run(tmp_path, lambda c: seen.append(len(Results(tmp_path / "cells.jsonl").lines)) or {})
    assert seen == [0, 1, 2, 3, 4]


def test_progress_counts_up_and_knows_the_time_left(tmp_path):
    _, events = run(tmp_path)
    assert [e.done for e in events if e.kind == "cell"] == [1, 2, 3, 4, 5]
    assert {e.total for e in events} == {5}
    starts = [e.seconds_left for e in events if e.kind == "start"]
    assert starts[0] is None and all(s >= 0 for s in starts[1:])


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 400))
def test_cut_anywhere_it_goes_on_with_the_same_results(tmp_path_factory, cut):
    """The file as kill -9 or a full disk leaves it: any number of bytes missing at the end."""
    folder = tmp_path_factory.mktemp("cut")
    path = folder / "cells.jsonl"
    whole, _ = run(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    kept = data[:-cut].count(b"\n")
    torn = not data[:-cut].endswith(b"\n") and len(data) > cut
    again = Results(path)
    assert bool(again.notice) == torn
    assert not torn or "unfinished line; they were cut off" in again.notice
    assert len(again.lines) == kept
    asked = []
    results, _ = run(folder, lambda c: asked.append(c) or {"value": c.label})
    assert len(asked) == 5 - kept
    assert {k: v["value"] for k, v in results.lines.items()} == {k: v["value"] for k, v in whole.lines.items()}


@pytest.mark.parametrize("bad", [b"{]", b"17", b'{"key": 3}', b"\x00\x00\xff", b""])
def test_a_corrupt_line_in_the_middle_is_named_and_nothing_is_touched(tmp_path, bad):
    run(tmp_path)
    path = tmp_path / "cells.jsonl"
    lines = path.read_bytes().splitlines()
    lines[2] = bad
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    with pytest.raises(CorruptResult) as e:
        Results(path)
    assert f"{path}, line 3" in str(e.value) and "Delete line 3 of cells.jsonl and start again" in str(e.value)
    assert path.read_bytes() == before
    del lines[2]
    path.write_bytes(b"\n".join(lines) + b"\n")
    asked = []
    run(tmp_path, lambda c: asked.append(c) or {})
    assert asked == [CELLS[2]]


def test_one_failing_cell_is_recorded_and_tried_again_next_time(tmp_path):
    def work(c):
        if c is CELLS[1]:
            raise ValueError("no good")
        return {}

    results, events = run(tmp_path, work)
    assert results.lines[CELLS[1].key]["error"] == {"type": "ValueError", "text": "no good"}
    assert "method1 at 0.5: loss failed: ValueError" in [e.text for e in events]
    assert all(results.lines[c.key]["error"] is None for c in CELLS if c is not CELLS[1])
    asked = []
    results, _ = run(tmp_path, lambda c: asked.append(c) or {})
    assert asked == [CELLS[1]] and results.lines[CELLS[1].key]["error"] is None


def test_an_interruption_leaves_what_was_finished(tmp_path):
    def work(c):
        if c is CELLS[3]:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, work)
    assert len(Results(tmp_path / "cells.jsonl").lines) == 3


def test_a_full_disk_is_said_and_what_was_finished_stays(tmp_path, monkeypatch):
    run(tmp_path, cells=CELLS[:2])
    before = (tmp_path / "cells.jsonl").read_bytes()

    def fsync(handle):
        os.truncate(handle, len(before) + 10)  # as a disk without room for the rest
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CannotRun, match=r"cells\.jsonl: No space left on device\. Mend that and start again"):
        run(tmp_path)
    monkeypatch.undo()
    assert len(Results(tmp_path / "cells.jsonl").lines) == 2
    assert (tmp_path / "cells.jsonl").read_bytes() == before


def test_nan_never_reaches_the_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        run(tmp_path, lambda c: {"score": float("nan")})
    assert Results(tmp_path / "cells.jsonl").lines == {}


def test_json_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
