"""Child processes that need torch: forked from a server that has imported it and nothing of ours, which saves each of
them the seconds of a start. One server for each process that runs tests.

    code, said = run("pytest:main", ["tests/ops/test_topk.py"], TRITON_INTERPRET="1")

The call is named, module:function, so that the child imports it after its variables are set.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "hypothesis", "pytest"])


def _work(call: str, given: tuple[Any, ...], environ: dict[str, str], log: str) -> None:
    """In the child: what it says goes to the log, what it returns is its code."""
    os.environ.update(environ)
    file = os.open(log, os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    module, _, name = call.partition(":")
    sys.exit(int(getattr(importlib.import_module(module), name)(*given) or 0))


@dataclasses.dataclass
class Child:
    """A call that is under way."""

    process: Any
    log: Path

    def wait(self, seconds: float = 280) -> tuple[int, str]:
        """Its exit code, and all that it said; killed, and an error, where it takes longer."""
        self.process.join(seconds)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        said = self.log.read_text(encoding="utf-8", errors="replace")
        self.log.unlink()
        assert not late, f"it took longer than {seconds:g} s:\n{said[-6000:]}"
        return self.process.exitcode, said


def start(call: str, *given: Any, **environ: str) -> Child:
    """Beside this process; what is given must be plain."""
    file, log = tempfile.mkstemp(prefix="child-", suffix=".log")
    os.close(file)
    process = FORKS.Process(target=_work, args=(call, given, environ, log))
    process.start()
    return Child(process, Path(log))


def run(call: str, *given: Any, seconds: float = 280, **environ: str) -> tuple[int, str]:
    """To its end."""
    return start(call, *given, **environ).wait(seconds)
