"""The workers of a Ray cluster: who is hired, what each does, and what is done about those that die."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from saccade.core.errors import CannotRun
from saccade.measure.runner import Event, Piece, Progress, Queue, Worker, failed_line, line_of

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger("saccade")

TRIES = 3  # workers that a cell may kill, or that may die before they are ready at one place
TICK_SECONDS = 0.5  # how often is looked for new and lost nodes
PATIENCE_SECONDS = 30.0  # without a worker, after which that is said
CONNECT_SECONDS = 10.0  # for a cluster to answer
HEAD_SECONDS = 15.0  # without an answer of the head, after which it is held to be dead
RESUMES = "Finished cells are kept; the same command resumes."


def answers(address: str) -> None:
    """Whether anybody does at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


# --- there ------------------------------------------------------------------------------------------------------------


class Actor:
    """A worker in its own process, on its own device, with as many threads as who asked has: rounding depends on it."""

    def __init__(self, make: Callable[[], Worker], threads: int):
        self.make, self.threads, self.worker = make, threads, None

    def about(self) -> Any:
        """Load, and say what was loaded."""
        torch.set_num_threads(self.threads)
        self.worker = self.make()
        return self.worker.about

    def line(self, cell: Any) -> dict[str, Any]:
        """A cell's line."""
        assert self.worker is not None, "about() comes first"
        return line_of(cell, self.worker.work)


# --- here -------------------------------------------------------------------------------------------------------------

Place = tuple[str, int]  # node, number of the device on it


@dataclass(eq=False)
class Hired:
    """An actor, and the answer that it owes: a line if it has a cell, what it is if it is `new`, else none."""

    place: Place
    actor: Any
    owes: ObjectRef | None
    new: bool = True
    cell: Any = None


class Team:
    """The workers of a cluster, and what each is doing."""

    def __init__(
        self,
        ray: Any,
        make: Callable[[], Worker],
        begin: Callable[[Any], Queue],
        progress: Progress,
        kind: str,
        head: str = "",
    ):
        self.ray, self.make, self.begin, self.progress, self.kind = ray, make, begin, progress, kind
        self.head, self.heard = head, time.monotonic()
        self.threads = torch.get_num_threads()
        self.hired: dict[Place, Hired] = {}
        self.useless: dict[Place, str] = {}
        self.deaths: Counter[Any] = Counter()  # by cell, and of new workers by place
        self.queue: Queue | None = None
        self.mark = ""
        self.lonely_since = time.monotonic()

    def work(self) -> None:
        """Until nothing is left."""
        while self.queue is None or not self.queue.over:
            if self._head_answers():
                self._hire()
            owed = {hired.owes: hired for hired in self.hired.values() if hired.owes is not None}
            ready = self.ray.wait(list(owed), timeout=TICK_SECONDS)[0] if owed else time.sleep(TICK_SECONDS)
            for answer in ready or ():
                self._settle(owed[answer])
            self._hand_out()

    def dismiss(self) -> None:
        """End all workers."""
        for hired in [*self.hired.values()]:
            self._dismiss(hired)

    def _head_answers(self) -> bool:
        """Nothing may be asked of a dead one: Ray waits for a minute, then ends this process with no word of ours."""
        try:
            answers(self.head)
        except OSError as e:
            if time.monotonic() - self.heard < HEAD_SECONDS:
                return False
            self.hired.clear()  # workers end with their cluster; to dismiss them is to ask its head
            raise CannotRun(f"Ray at {self.head}", f"its head does not answer any more: {e}", RESUMES) from e
        self.heard = time.monotonic()
        return True

    # --- workers come and go

    def _hire(self) -> None:
        """A worker for every place that has none, on every node that is there now."""
        places = [place for node in self.ray.nodes() if node["Alive"] for place in self._places(node)]
        useful = [place for place in places if place not in self.useless]
        if not useful and not self.hired:
            raise CannotRun("a worker on Ray", list(self.useless.values()) or [self._no_place()], RESUMES)
        most = len(self.queue.left) if self.queue else len(useful)
        for place in useful:
            if place not in self.hired and len(self.hired) < most:
                actor = self._actor(place)
                self.hired[place] = Hired(place, actor, actor.about.remote())
        self._say_if_lonely()

    def _places(self, node: dict[str, Any]) -> list[Place]:
        """One per GPU; of processors, one per as many as a worker has threads."""
        has = node["Resources"]
        count = has.get("GPU", 0) if self.kind != "cpu" else has.get("CPU", 0) // self.threads
        return [(node["NodeID"], number) for number in range(int(count))]

    def _no_place(self) -> str:
        if self.kind != "cpu":
            return "no node has a GPU"
        return f"no node has {self.threads} CPUs, one per thread of this process (OMP_NUM_THREADS sets them)"

    def _actor(self, place: Place) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        needs = {"num_cpus": self.threads} if self.kind == "cpu" else {"num_cpus": 1, "num_gpus": 1}
        there = NodeAffinitySchedulingStrategy(node_id=place[0], soft=False)
        made = self.ray.remote(Actor).options(scheduling_strategy=there, max_restarts=0, **needs)
        return made.remote(self.make, self.threads)

    def _dismiss(self, hired: Hired) -> None:
        self.ray.kill(hired.actor)
        del self.hired[hired.place]

    def _say_if_lonely(self) -> None:
        """Devices that others use come free some time, or never."""
        if any(not hired.new for hired in self.hired.values()):
            self.lonely_since = time.monotonic()
        elif time.monotonic() - self.lonely_since > PATIENCE_SECONDS:
            self.lonely_since = float("inf")
            self._note(f"waiting for a worker: none of {len(self.hired)} places has been free or ready so far")

    # --- answers

    def _settle(self, hired: Hired) -> None:
        """Take an answer, or take note of a death."""
        from ray.exceptions import RayError, RayTaskError

        try:
            answer = self.ray.get(hired.owes)
        except RayTaskError as e:
            self._failed(hired, e)
        except RayError as e:
            self._died(hired, e)
        else:
            hired.owes = None
            if hired.new:
                self._welcome(hired, answer)
            else:
                self._queue.put(hired.cell, answer)
                hired.cell = None

    def _welcome(self, hired: Hired, about: Any) -> None:
        """The first decides what the sweep is; who would give other results is sent home."""
        hired.new = False
        if self.queue is None:
            self.mark, self.queue = about.mark, self.begin(about)
        elif about.mark != self.mark:
            self._refuse(hired, "it is another machine, or has other versions, than the first: results would differ")

    def _failed(self, hired: Hired, error: Any) -> None:
        """Loading failed, or a cell without which nothing is worth anything."""
        cause = error.cause if isinstance(error.cause, Exception) else error
        if not hired.new or self.queue is None:
            raise cause from error
        self._refuse(hired, f"{type(cause).__name__}: {cause}")

    def _refuse(self, hired: Hired, why: str) -> None:
        self.useless[hired.place] = f"node {hired.place[0][:8]} takes no part: {why}"
        self._note(self.useless[hired.place])
        self._dismiss(hired)

    def _died(self, hired: Hired, error: Exception) -> None:
        """Its cell goes to another worker, unless it has killed too many."""
        what = hired.place if hired.new else hired.cell.key
        self.deaths[what] += 1
        log.warning("a worker died", exc_info=error)
        if hired.new and self.deaths[what] >= TRIES:
            last = str(error).strip().splitlines()[-1]
            return self._refuse(hired, f"{TRIES} workers died before they were ready; of the last: {last}")
        self._dismiss(hired)
        if hired.new:
            return None
        if self.deaths[what] >= TRIES:
            return self._give_up(hired.cell)
        self._note(f"a worker died at {hired.cell}; another one takes it")
        self._queue.back(hired.cell)
        return None

    def _give_up(self, cell: Piece) -> None:
        text = f"{TRIES} workers died at it, one after the other; out of memory?"
        if cell.vital:
            raise CannotRun(f"{cell} on Ray", text, RESUMES)
        self._queue.put(cell, failed_line(cell, "WorkerDied", text))

    # --- work

    def _hand_out(self) -> None:
        for hired in self.hired.values():
            if not hired.new and hired.cell is None and self.queue is not None:
                hired.cell = self.queue.take(lambda cell, hired=hired: self._fits(cell, hired))
                hired.owes = hired.actor.line.remote(hired.cell) if hired.cell is not None else None

    def _fits(self, cell: Piece, hired: Hired) -> bool:
        """What is timed on processors has a node to itself; GPUs do not disturb one another."""
        beside = [h.cell for h in self.hired.values() if h.place[0] == hired.place[0] and h.cell is not None]
        return self.kind != "cpu" or not (beside if cell.alone else any(other.alone for other in beside))

    @property
    def _queue(self) -> Queue:
        assert self.queue is not None, "a cell was handed out"
        return self.queue

    def _note(self, text: str) -> None:
        self.queue.note(text) if self.queue is not None else self.progress(Event("note", text))
