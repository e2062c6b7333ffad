"""Sweeps on Ray: one worker per device of a cluster, each with its model loaded. What dies is replaced.

Cells are handed out and written down by the process that asked for the sweep; workers need no common disk. A cell whose
worker or node dies is given to another one; what kills every worker that takes it becomes a failed cell.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from saccade.core.errors import BadOption, CannotRun
from saccade.engines.team import Team, answers
from saccade.measure.runner import Progress, Queue, Worker

STORE_BYTES = 100 * 2**20  # of shared memory: lines are small, and Ray refuses less than 75 MiB


class Ray:
    """Runs a sweep on the devices of a Ray cluster.

    address: of a running cluster, "auto" for the one of this machine; None: one of this machine alone, which lasts as
        long as the sweep. In a program that has called `ray.init` itself: None, and it is that one

    Raises:
        CannotRun: Ray is not installed.
    """

    def __init__(self, address: str | None = None):
        self.ray, self.address = _library(), address

    def run(self, make: Callable[[], Worker], begin: Callable[[Any], Queue], progress: Progress, device: str) -> None:
        """Make a worker on every device, and let them empty the queue.

        Raises:
            BadOption: one device is named where Ray chooses them.
            CannotRun: no cluster at the address, its head has died, or no node can hold a worker.
        """
        kind, _, number = device.partition(":")
        if number:
            raise BadOption(f"device {device!r} on Ray", "Ray gives each worker a device", f"Say {kind!r}.")
        with self._cluster():
            team = Team(self.ray, make, begin, progress, kind, self._head())
            try:
                team.work()
            finally:
                team.dismiss()

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[None]:
        if self.address is None and self.ray.is_initialized():
            yield
            return
        own = {"address": "local", "include_dashboard": False, "object_store_memory": STORE_BYTES}
        where = {"address": self.address} if self.address else own
        asked = f"Ray at {self.address or 'this machine'}"
        try:
            meant = _meant(self.address)
            asked += f" ({meant})" if meant != self.address and meant else ""
            answers(meant)
            with _without_reports():
                self.ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as e:  # Ray has no class of its own for a start that fails
            do = "Start a cluster and name it: ray start --head; --address auto. With a token: RAY_AUTH_MODE=token."
            raise CannotRun(asked, str(e).strip().rstrip("."), do) from e
        try:
            yield
        finally:
            self.ray.shutdown()

    def _head(self) -> str:
        """HOST:PORT at which the head of the cluster answers; "" for a client, which does not see it."""
        return "" if self.ray.util.client.ray.is_connected() else self.ray.get_runtime_context().gcs_address


def _library() -> Any:
    try:
        import ray
    except ImportError as e:
        raise CannotRun("engine 'ray'", "ray is not installed", "Install the extra: pip install 'saccade[ray]'.") from e
    return ray


def _meant(address: str | None) -> str:
    """Where Ray would look: for "auto" what RAY_ADDRESS, running processes or the file of the last head say of it."""
    if address != "auto":
        return address or ""
    from ray._private import services  # Ray publishes nothing that tells

    services.find_gcs_addresses.cache_clear()  # `ray.init` does too: clusters come and go
    return services.get_ray_address_from_environment(address, None)


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Ray sends usage reports unless the environment in which its processes start says otherwise."""
    name, before = "RAY_USAGE_STATS_ENABLED", os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
