"""What is on disk survives: killed processes, corrupt files, failing cells, interruptions."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from saccade.core.errors import CannotRun, CorruptResult
from saccade.measure.cells import Cell
from saccade.measure.runner import Event, Local, Queue
from saccade.measure.store import Store, write_json


def cell(number: int) -> Cell:
    return Cell("quality", "m", f"method{number}", "0.5", "loss", 64, 2, 0, "float32", 0, "")


CELLS = [cell(i) for i in range(5)]


def run(folder: Path, work=lambda c: {"value": c.label}, cells=CELLS) -> tuple[Store, list[Event]]:
    events: list[Event] = []
    store = Store(folder)
    worker = types.SimpleNamespace(about=None, work=work)
    Local().run(lambda: worker, lambda about: Queue(cells, store, lambda c: 1.0, events.append), events.append, "cpu")
    return store, events


def there(folder: Path) -> set[str]:
    """Keys of what is on disk."""
    return {p.stem for p in (folder / "cells").glob("*.json")}


def test_every_field_of_a_cell_changes_its_key():
    base = cell(0)
    for name, value in vars(base).items():
        other = "speed" if name == "kind" else value + 1 if isinstance(value, int) else value + "x"
        assert Cell(**(vars(base) | {name: other})).key != base.key
    assert cell(0).key == base.key


def test_a_finished_cell_is_not_run_again(tmp_path):
    run(tmp_path, cells=CELLS[:3])
    asked = []
    _, events = run(tmp_path, lambda c: asked.append(c) or {})
    assert asked == CELLS[3:] and there(tmp_path) == {c.key for c in CELLS}
    assert events[0].text == "3 of 5 cells are finished already"


def test_a_result_is_on_disk_before_the_next_cell_begins(tmp_path):
    seen = []
    run(tmp_path, lambda c: seen.append(len(there(tmp_path))) or {})
    assert seen == [0, 1, 2, 3, 4]


def test_progress_counts_up_and_knows_the_time_left(tmp_path):
    _, events = run(tmp_path)
    assert [e.done for e in events if e.kind == "cell"] == [1, 2, 3, 4, 5]
    assert {e.total for e in events} == {5}
    starts = [e.seconds_left for e in events if e.kind == "start"]
    assert starts[0] is None and all(s >= 0 for s in starts[1:])


@pytest.mark.parametrize("bad", [b"{]", b"17", b'{"key": 3}', b"\x00\x00\xff", b""])
def test_a_corrupt_cell_is_named_and_nothing_is_touched(tmp_path, bad):
    run(tmp_path)
    path = Store(tmp_path).path(CELLS[2].key)
    path.write_bytes(bad)
    with pytest.raises(CorruptResult) as e:
        run(tmp_path)
    assert str(path) in str(e.value) and f"Delete {path.name} and start again: its cell" in str(e.value)
    assert path.read_bytes() == bad
    path.unlink()
    asked = []
    run(tmp_path, lambda c: asked.append(c) or {})
    assert asked == [CELLS[2]]


def test_cells_that_were_once_lines_of_one_file_are_read(tmp_path):
    rows = [{**c.head(), "error": None, "value": i} for i in (0, 1) for c in CELLS[:3]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "cells.jsonl").write_text(text + '{"key": "to')
    store, _ = run(tmp_path)
    values = [store.read(c.key)["value"] for c in CELLS]
    assert values == [1, 1, 1, "method3", "method4"] and len(list(store.folder.glob("*.json"))) == 2
    (tmp_path / "cells.jsonl").write_text("{]\n" + text)
    with pytest.raises(CorruptResult, match=r"cells.jsonl, line 1: it is no JSON .*Delete line 1 of cells.jsonl and"):
        Store(tmp_path)


# --- several processes ------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from saccade.measure.store import Store
assert "torch" not in sys.modules
store = Store(Path(sys.argv[1]))
print([store.reserve(key) for key in sys.argv[2:]], flush=True)
time.sleep(600)
"""


def test_what_another_process_has_is_left_to_it_until_it_dies(tmp_path):
    keys = [c.key for c in CELLS[:2]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path), *keys]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "[True, True]\n"
        store, events = Store(tmp_path), []
        queue = Queue(CELLS, store, lambda c: 1.0, events.append)
        taken = [queue.take() for _ in range(4)]
        assert taken == [*CELLS[2:], None] and not queue.over
        store.write({**CELLS[0].head(), "error": None})  # as the other would
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert queue.take() == CELLS[1], "the first was finished meanwhile, the second is free again"
        assert queue.done == 1 and queue.take() is None
        store.__exit__()


def test_what_another_process_finishes_while_the_queue_is_made_is_not_begun_again(tmp_path):
    class Busy(Store):
        """A folder in which another process finishes each cell just after it was found missing here."""

        def read(self, key):
            line = super().read(key)
            if line is None:
                self.write({"key": key, "error": None})
            return line

    store, events = Busy(tmp_path), []
    queue = Queue(CELLS, store, lambda c: 1.0, events.append)
    written = {c.key: store.stamp(c.key) for c in CELLS}
    assert None not in written.values(), "they were not there when the queue looked, and are now"
    assert queue.take() is None and queue.over and not events
    assert {c.key: store.stamp(c.key) for c in CELLS} == written


def test_what_is_reserved_is_given_back_when_the_store_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), Store(tmp_path) as store:
        assert store.reserve("a")
        raise KeyboardInterrupt
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER.replace("600", "0"), str(tmp_path), "a"]
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == "[True]\n"


def test_what_was_given_back_is_taken_again(tmp_path):
    queue = Queue(CELLS[:1], Store(tmp_path), lambda c: 1.0, lambda event: None)
    assert (queue.take(), queue.take()) == (CELLS[0], None)
    queue.back(CELLS[0])
    assert queue.take(lambda c: c.alone) is None
    assert queue.take() == CELLS[0]
    queue.put(CELLS[0], {**CELLS[0].head(), "error": None})
    assert queue.over


def test_here_it_waits_for_what_others_have(tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setattr(Store, "reserve", lambda self, key: key != CELLS[0].key or store.stamp(key) is not None)
    monkeypatch.setattr("time.sleep", lambda seconds: store.write({**CELLS[0].head(), "error": None}))
    _, events = run(tmp_path)
    assert "waiting for 1 cells that other processes work on" in [e.text for e in events]
    assert [str(c) for c in CELLS[1:]] == [e.text for e in events if e.kind == "cell"]


def test_where_nothing_can_be_locked_that_is_said(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with caplog.at_level("WARNING", logger="saccade"):  # the command line sets it for its process
        assert Store(tmp_path).reserve("a")
    assert "cannot be locked (No locks available): let no other process work in it" in caplog.text


# --- failures ---------------------------------------------------------------------------------------------------------


def test_one_failing_cell_is_recorded_and_tried_again_next_time(tmp_path):
    def work(c):
        if c is CELLS[1]:
            raise ValueError("no good")
        return {}

    store, events = run(tmp_path, work)
    assert store.read(CELLS[1].key)["error"] == {"type": "ValueError", "text": "no good"}
    assert "method1 at 0.5: loss failed: ValueError" in [e.text for e in events]
    assert all(store.read(c.key)["error"] is None for c in CELLS if c is not CELLS[1])
    asked = []
    run(tmp_path, lambda c: asked.append(c) or {})
    assert asked == [CELLS[1]] and store.read(CELLS[1].key)["error"] is None


def test_an_interruption_leaves_what_was_finished(tmp_path):
    def work(c):
        if c is CELLS[3]:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, work)
    assert len(there(tmp_path)) == 3


def test_a_full_disk_is_said_and_what_was_finished_stays(tmp_path, monkeypatch):
    run(tmp_path, cells=CELLS[:2])

    def fsync(handle):
        os.truncate(handle, 10)  # as a disk without room for the rest
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CannotRun, match=r"\.json: No space left on device\. Mend that and start again"):
        run(tmp_path)
    monkeypatch.undo()
    assert there(tmp_path) == {c.key for c in CELLS[:2]}
    assert not list(tmp_path.rglob("*.part"))


def test_a_half_written_file_is_none(tmp_path):
    """As kill -9 leaves it in the middle of writing."""
    store, _ = run(tmp_path, cells=CELLS[:2])
    (store.folder / f".{CELLS[2].key}.json.0123.part").write_text('{"key": "to')
    assert there(tmp_path) == {c.key for c in CELLS[:2]} and store.read(CELLS[2].key) is None


def test_nan_never_reaches_the_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        run(tmp_path, lambda c: {"score": float("nan")})
    assert there(tmp_path) == set()


def test_json_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
