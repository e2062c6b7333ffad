"""The head of a Ray cluster is killed in the middle: what is finished stays, on a new cluster and without Ray."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from saccade.core.errors import CannotRun
from saccade.engines import ray as engine
from saccade.measure.compare import compare
from tests.engines.test_ray import below, needs_ray, node, same_as, start, team, wait_for
from tests.engines.toys import Toy
from tests.measure import small
from tests.measure.test_compare import METHODS, SMALL, read, stored


def free_port() -> int:
    """Nobody's, so that several test runs may share a machine."""
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


def end(process: subprocess.Popen) -> None:
    """SIGKILL for it and all below it."""
    for pid in [*below(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def cluster() -> Iterator[tuple[subprocess.Popen, str]]:
    """A head with one processor, and its address."""
    port = free_port()
    head = node("--head", f"--port={port}", "--include-dashboard=false")
    try:
        yield head, f"127.0.0.1:{port}"
    finally:
        end(head)


def cut_short(tiny: Path, folder: Path) -> int:
    """The code of a comparison whose head dies when a quarter of its cells is there."""
    with cluster() as (head, address):
        driver = start(tiny, folder, "--address", address)
        try:
            wait_for(folder, 10, driver)
            end(head)
            return driver.wait()
        finally:
            driver.kill()


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_head_is_said_and_no_finished_cell_is_measured_twice(tmp_path, capfd):
    tiny, folder, here = small.save(tmp_path / "tiny"), tmp_path / "run", tmp_path / "here"
    assert cut_short(tiny, folder) == 3
    assert "its head does not answer any more: " in (said := capfd.readouterr().err) and engine.RESUMES in said
    before, total = stored(folder), len(read(folder, "run")["cells"])
    assert 10 <= len(before) < total, "it was over before the head was killed"
    shutil.copytree(folder, here)

    events = []
    compare(tiny, METHODS, out=here, progress=events.append, **SMALL)
    assert sum(event.kind == "cell" for event in events) == total - len(before)
    with cluster() as (_, address):
        assert start(tiny, folder, "--address", address).wait() == 0
    for finished in (folder, here):
        assert before.items() <= stored(finished).items(), "what was finished was computed anew"
    assert same_as(folder, here)


def test_a_head_is_given_time_and_meanwhile_asked_for_nothing(tmp_path, monkeypatch):
    made, _ = team(tmp_path, [Toy("a")])
    made.ray = SimpleNamespace(nodes=lambda: pytest.fail("it was asked"))
    made.head = f"127.0.0.1:{free_port()}"
    assert not made._head_answers() and made.hired
    made.heard = time.monotonic() - engine.HEAD_SECONDS
    with pytest.raises(CannotRun, match=r"Ray at 127\.0\.0\.1:\d+: its head does not answer any more: .*refused"):
        made.work()
    assert not made.hired, "they would be dismissed through the head"
