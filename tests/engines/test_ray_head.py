"""The head of a Ray cluster is killed in the middle: what is finished stays, on a new cluster and without Ray."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from saccade.core.errors import CannotRun
from saccade.engines import ray as engine
from saccade.engines import team as workers
from saccade.measure.compare import compare
from tests.engines.test_ray import LONG, below, needs_ray, node, same_as, start, team, wait_for, wait_for_the_end_of
from tests.engines.toys import Toy, Toys
from tests.measure import small
from tests.measure.test_compare import METHODS, read, stored


def free_port() -> int:
    """Nobody's, so that several test runs may share a machine."""
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


def end(process: subprocess.Popen) -> None:
    """SIGKILL for it and all below it. Until each is gone it may still answer."""
    pids = [*below(process.pid), process.pid]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_for_the_end_of(pids)


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
    assert "its head does not answer any more: " in (said := capfd.readouterr().err) and workers.RESUMES in said
    before, total = stored(folder), len(read(folder, "run")["cells"])
    assert 10 <= len(before) < total, "it was over before the head was killed"
    shutil.copytree(folder, here)

    events = []
    compare(tiny, METHODS, out=here, progress=events.append, **LONG)
    assert sum(event.kind == "cell" for event in events) == total - len(before)
    with cluster() as (_, address):
        assert start(tiny, folder, "--address", address).wait() == 0
    for finished in (folder, here):
        assert before.items() <= stored(finished).items(), "what was finished was computed anew"
    assert same_as(folder, here)


@pytest.fixture
def alone(monkeypatch) -> Iterator[Path]:
    """Ray's folder of this test alone, and a machine without the clusters of others. Sockets allow no longer path."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(frozenset))
        yield Path(folder) / "ray"


def refused(where: str, found: str) -> None:
    """Of `auto`, at once, and in words. Ray itself would try for minutes."""
    began = time.monotonic()
    with pytest.raises(CannotRun, match=rf"^Ray at auto{where}: .*{found}.*\. Start a cluster and name it: ray start"):
        engine.Ray("auto").run(Toys, lambda about: None, lambda event: None, "cpu")
    assert time.monotonic() - began < workers.CONNECT_SECONDS


@needs_ray
@pytest.mark.slow
def test_a_head_that_was_killed_is_not_waited_for_by_auto(alone):
    with cluster() as (_, address):
        left = alone / "ray_current_cluster"
        while not left.exists():  # Ray says first that it has started
            time.sleep(0.01)
    assert left.read_text().endswith(address[-6:]), "it dies, and this stays"
    refused(rf" \(\S+{address[-6:]}\)", "refused")


@needs_ray
def test_auto_is_where_ray_would_look(alone, monkeypatch):
    refused("", "Could not find any running Ray instance")
    alone.mkdir()
    (alone / "ray_current_cluster").write_text(left := f"127.0.0.1:{free_port()}")
    refused(rf" \({left}\)", "refused")
    monkeypatch.setenv("RAY_ADDRESS", named := f"ray://127.0.0.1:{free_port()}")
    refused(rf" \({named}\)", "refused")


def test_a_head_is_given_time_and_meanwhile_asked_for_nothing(tmp_path, monkeypatch):
    made, _ = team(tmp_path, [Toy("a")])
    made.ray = SimpleNamespace(nodes=lambda: pytest.fail("it was asked"))
    made.head = f"127.0.0.1:{free_port()}"
    assert not made._head_answers() and made.hired
    made.heard = time.monotonic() - workers.HEAD_SECONDS
    with pytest.raises(CannotRun, match=r"Ray at 127\.0\.0\.1:\d+: its head does not answer any more: .*refused"):
        made.work()
    assert not made.hired, "they would be dismissed through the head"
