"""Sweeps on Ray: real clusters of this machine, workers, nodes and drivers that are really killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from saccade.cli import main
from saccade.core.errors import BadOption, CannotRun
from saccade.engines.ray import STORE_BYTES, Ray
from saccade.engines.team import TRIES, Hired, Team
from saccade.measure.compare import compare
from saccade.measure.runner import Queue
from saccade.measure.store import Store
from tests.engines.toys import Broken, Toy, Toys
from tests.measure import small
from tests.measure.test_compare import METHODS, SMALL, read, stored, timeless

try:
    import ray
except ImportError:
    ray = None

MODE = os.environ.get("RAY_AUTH_MODE")
needs_ray = pytest.mark.skipif(ray is None, reason="ray is not installed: pip install 'saccade[ray]'")
ENV = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "OMP_NUM_THREADS": "1"}
ENV |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
ENV |= {"RAY_worker_niceness": "0"}  # a busy machine would starve them else
LONG = SMALL | {"count": 40}  # seconds, in which a second worker comes up, and which can be cut short


# --- a toy sweep ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    """A cluster in this process, as a program has that called `ray.init` itself."""
    if ray is None:
        pytest.skip("ray is not installed: pip install 'saccade[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENV.items():
            patch.setenv(name, value)
        if MODE is None:  # Ray has read it when it was imported: `init` has to find what was there then
            del os.environ["RAY_AUTH_MODE"]
        else:
            patch.setenv("RAY_AUTH_MODE", MODE)
        before = begin()
        yield
        started = below(os.getpid()).keys() - before
        ray.shutdown()
    wait_for_the_end_of(started)


def begin() -> set[int]:
    """Ray in this process; what ran below it before. A start ends after 30 seconds, which a busy machine may need."""
    own = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    for last in (False, False, True):
        before = {*below(os.getpid())}
        try:
            ray.init(address="local", log_to_driver=False, **own)
            break
        except Exception:  # Ray has no class of its own for a start that fails
            if last:
                raise
            for pid in below(os.getpid()).keys() - before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return before


def sweep(folder: Path, cells: list[Toy], make: Callable = Toys) -> tuple[dict[str, dict], list[str]]:
    """Lines by key, and what was told."""
    told, store = [], Store(folder)
    Ray().run(make, lambda about: Queue(cells, store, lambda c: 1.0, told.append), told.append, "cpu")
    return {c.key: store.read(c.key) or {} for c in cells}, [event.text for event in told if event.kind != "start"]


def test_a_worker_dies_and_a_cell_raises_and_the_sweep_goes_on(here, tmp_path):
    cells = [Toy(f"c{i}") for i in range(12)] + [Toy("bad", "raises"), Toy("deadly", "kills once", str(tmp_path))]
    lines, told = sweep(tmp_path, cells[::-1])
    errors = {key: line["error"] for key, line in lines.items() if line["error"]}
    assert errors == {"bad": {"type": "ValueError", "text": "no good"}}
    dead = int((tmp_path / "deadly.died").read_text())
    assert "a worker died at deadly; another one takes it" in told
    assert not {os.getpid(), dead} & {line["pid"] for line in lines.values() if line["key"] != "bad"}
    assert ray.is_initialized(), "what we did not start we do not end"


@pytest.mark.slow
def test_what_kills_every_worker_becomes_a_failed_cell_and_what_fails_and_is_vital_ends_the_sweep(here, tmp_path):
    lines, _ = sweep(tmp_path, [Toy("deadly", "kills", str(tmp_path)), Toy("well")])
    error = {"type": "WorkerDied", "text": f"{TRIES} workers died at it, one after the other; out of memory?"}
    assert lines["deadly"]["error"] == error and not lines["well"]["error"]
    with pytest.raises(ValueError, match="no good"):
        sweep(tmp_path, [Toy("w", "raises", vital=True)])


@pytest.mark.slow
def test_what_cannot_be_made_is_said_as_it_is_here(here, tmp_path):
    with pytest.raises(CannotRun, match=r"^load x: it is not there\. Put it there\.$"):
        sweep(tmp_path, [Toy("a")], Broken)


@pytest.mark.slow
def test_too_many_threads_for_any_node(here, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    with pytest.raises(CannotRun, match=r"a worker on Ray: no node has 64 CPUs, one per thread .*OMP_NUM_THREADS"):
        sweep(tmp_path, [Toy("a")])


# --- who works on what, without a cluster -----------------------------------------------------------------------------


def team(folder: Path, cells: list[Toy], kind: str = "cpu") -> tuple[Team, list[str]]:
    """Two workers of one node and one of another, none of them real."""
    told, store = [], Store(folder)
    queue = Queue(cells, store, lambda c: 1.0, told.append)
    made = Team(SimpleNamespace(kill=lambda actor: None), Toys, lambda about: queue, told.append, kind)
    line = SimpleNamespace(remote=lambda cell: cell)
    for place in (("here-and-there", 0), ("here-and-there", 1), ("elsewhere", 0)):
        made.hired[place] = Hired(place, SimpleNamespace(line=line), None)
    return made, told


@pytest.mark.parametrize("kind, first", [("cpu", ["a", None, "b"]), ("cuda", ["a", "b", "c"])])
def test_what_is_timed_on_processors_has_a_node_to_itself(tmp_path, kind, first):
    made, _ = team(tmp_path, [Toy("a", alone=True), Toy("b"), Toy("c", alone=True)], kind)
    workers = [*made.hired.values()]
    for hired in workers:
        made._welcome(hired, Toys.about)
    made._hand_out()
    assert [hired.cell and hired.cell.key for hired in workers] == first


def test_a_worker_that_would_give_other_results_takes_no_part(tmp_path):
    made, told = team(tmp_path, [Toy("a")])
    first, second, third = made.hired.values()
    made._welcome(first, SimpleNamespace(mark="a"))
    made._welcome(second, SimpleNamespace(mark="b"))
    made._welcome(third, SimpleNamespace(mark="a"))
    assert [*made.hired.values()] == [first, third]
    why = "it is another machine, or has other versions, than the first: results would differ"
    why = f"node here-and takes no part: {why}"
    assert [event.text for event in told] == [why] and made.useless == {second.place: why}


def test_what_kills_every_worker_and_is_vital_ends_the_sweep(tmp_path):
    made, told = team(tmp_path, [Toy("v", vital=True)])
    with pytest.raises(CannotRun, match=r"v on Ray: 3 workers died at it.*the same command resumes"):
        for hired in [*made.hired.values()]:
            made._welcome(hired, Toys.about)
            made._hand_out()
            made._died(hired, RuntimeError("killed"))
    assert [e.text for e in told if e.kind == "note"] == ["a worker died at v; another one takes it"] * (TRIES - 1)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_without_ray_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["claim", "snapkv", "--engine", "ray"]) == 3
    said = "CannotRun: engine 'ray': ray is not installed. Install the extra: pip install 'saccade[ray]'.\n"
    assert capsys.readouterr().err == said


def test_engines_and_addresses_that_are_none(capsys):
    assert main(["claim", "snapkv", "--engine", "slurm"]) == 2
    assert "--engine slurm: there is none of that name. Say local or ray." in capsys.readouterr().err
    assert main(["claim", "snapkv", "--address", "auto"]) == 2
    assert "--address auto: the local engine has none. Add --engine ray." in capsys.readouterr().err


@needs_ray
def test_a_device_with_a_number_is_ray_s_to_choose():
    with pytest.raises(BadOption, match=r"device 'cuda:1' on Ray: Ray gives each worker a device\. Say 'cuda'\."):
        Ray().run(Toys, lambda about: None, lambda event: None, "cuda:1")


@needs_ray
def test_no_cluster_at_the_address():
    with pytest.raises(CannotRun, match=r"Ray at 127\.0\.0\.1:1: .*refused\. Start a cluster.*RAY_AUTH_MODE=token\."):
        Ray("127.0.0.1:1").run(Toys, lambda about: None, lambda event: None, "cpu")


# --- comparisons, with processes killed -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def local(tiny, tmp_path_factory):
    """What the local engine finds."""
    return compare(tiny, METHODS, out=tmp_path_factory.mktemp("local") / "run", **LONG)


def start(tiny: Path, folder: Path, *more: str) -> subprocess.Popen:
    """The same comparison on Ray, in a process of its own."""
    command = [sys.executable, "-m", "saccade", "compare", "--engine", "ray"]
    command += ["--model", str(tiny), "--out", str(folder)]
    for name, value in ({"methods": METHODS} | LONG).items():
        command += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return subprocess.Popen([*command, *more], env=os.environ | ENV, stdout=subprocess.DEVNULL)


def wait_for(folder: Path, count: int, process: subprocess.Popen) -> None:
    while len(stored(folder)) < count:
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.005)


def same_as(folder: Path, local: Path) -> bool:
    """To the byte, but for times."""
    mine, others = (json.dumps(timeless(read(place, "summary"))) for place in (folder, local))
    assert read(folder, "run") == read(local, "run") and stored(folder).keys() == stored(local).keys()
    return mine == others


def below(pid: int) -> dict[int, str]:
    """All processes that it started, and those that these started: pid -> command line."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    found, known = {}, {pid}
    while new := [(int(p), args) for p, parent, args in rows if int(parent) in known and int(p) not in known]:
        found |= dict(new)
        known |= found.keys()
    return found


def wait_for_the_end_of(pids: Iterable[int]) -> None:
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.1)


def found(pid: int, name: str, driver: subprocess.Popen) -> int:
    """A process of that name below another one, once there is one."""
    while not (some := [p for p, command in below(pid).items() if name in command]):
        assert driver.poll() is None, "it ended too soon"
        time.sleep(0.01)
    return some[0]


def node(*words: str) -> subprocess.Popen:
    """`ray start` as a process that stays. Ray gives up after 30 seconds, which a busy machine may need."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", *words]
    command.append(f"--object-store-memory={STORE_BYTES}")
    env = os.environ | ENV | {"PYTHONUNBUFFERED": "1"}
    for _ in range(3):
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
        if any("Ray runtime started" in line for line in process.stdout):
            return process
        process.wait()
    raise TimeoutError("no node starts here")


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_and_a_killed_driver_lose_nothing(tiny, local, tmp_path):
    folder, total = tmp_path / "run", len(stored(local))
    driver = start(tiny, folder)
    try:
        wait_for(folder, total // 4, driver)
        os.kill(found(driver.pid, "ray::Actor", driver), signal.SIGKILL)
        wait_for(folder, total // 2, driver)
        started = below(driver.pid)
    finally:
        driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = stored(folder)
    assert len(before) < total, "it was over before it was killed"
    assert start(tiny, folder).wait() == 0
    assert before.items() <= stored(folder).items(), "what was finished was computed anew"
    assert same_as(folder, local)
    wait_for_the_end_of(started)  # the cluster of a dead driver ends, some of its processes after a minute


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_node_loses_nothing(tiny, local, tmp_path):
    folder, total, port = tmp_path / "run", len(stored(local)), 6399
    nodes, driver = [node("--head", f"--port={port}", "--include-dashboard=false")], None
    try:
        nodes.append(node(f"--address=127.0.0.1:{port}"))
        driver = start(tiny, folder, "--address", f"127.0.0.1:{port}")
        wait_for(folder, total // 4, driver)
        found(nodes[1].pid, "ray::Actor", driver)
        before = stored(folder)
        os.kill(found(nodes[1].pid, "raylet/raylet", driver), signal.SIGKILL)
        assert len(before) < total and driver.wait() == 0
        assert before.items() <= stored(folder).items()
        assert same_as(folder, local)
    finally:
        for process in [*nodes, driver] if driver else nodes:
            for pid in [*below(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_claims_are_measured_there_and_kept_here(tmp_path):
    out = {}
    for name in ("local", "ray"):
        env = os.environ | ENV | {"SACCADE_CACHE": str(tmp_path / name)}
        command = [sys.executable, "-c", CLAIMING, "claim", "knorm", "duo-attention", "--tier", "smoke", "--json"]
        done = subprocess.run([*command, "--engine", name], env=env, capture_output=True, text=True, check=False)
        out[name] = done.returncode, json.loads(done.stdout)
        assert {p.name for p in (tmp_path / name / "claims").iterdir()} == {"knorm.jsonl", "duo_attention.jsonl"}
    times = ("seconds", "date")
    shown = [[{k: v for k, v in line.items() if k not in times} for line in out[name][1]] for name in out]
    assert shown[0] == shown[1] and out["local"][0] == out["ray"][0]


CLAIMING = """
import sys
from saccade.claims import _found
from saccade.core.paths import cache_dir
_found.folder = lambda: cache_dir("claims")  # not into the checkout
from saccade.cli import main
sys.exit(main(sys.argv[1:]))
"""
