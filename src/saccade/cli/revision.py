"""This checkout against another commit of it: tests first, then the same timing in both, in turns."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saccade.cli.console import Bar
from saccade.cli.tree import checkout, run_tests
from saccade.core.errors import CannotRun

TURNS = 3  # of both; each is a process of its own
START = "from saccade.cli import main; raise SystemExit(main())"
Key = tuple[str, int, str]  # op or method, tokens, back end or stage


def red_tests(ops: Sequence[str], methods: Sequence[str], device: str, bar: Bar) -> list[str]:
    """Files of tests of these ops and methods that fail here.

    Raises:
        CannotRun: this is no source checkout, or there is no pytest.
    """
    root, red = _root(), []
    files = [file for op in ops for file in _tests_of_op(root, op)]
    files += [root / "tests" / "methods" / f"test_{_stem(part)}.py" for name in methods for part in name.split("+")]
    marks = "not slow and not network" + ("" if device.startswith("cuda") else " and not gpu")
    for i, file in enumerate(dict.fromkeys(files)):
        bar(i, len(files), f"tests: {file.stem}")
        done = run_tests(file, "-m", marks)
        if done is None:
            raise CannotRun("bench --base", "pytest is missing", 'Install it: pip install "saccade[test]"')
        if done.returncode:
            red.append(file.stem)
    return red


def _root() -> Path:
    root = checkout()
    if root is None or not (root / ".git").exists():
        why = "this is an installed copy, and other commits are in a git checkout"
        raise CannotRun("bench --base", why, "Run it from a clone: pip install -e .")
    return root


def _tests_of_op(root: Path, op: str) -> list[Path]:
    """Those that call it."""
    call, files = f"ops.{op.replace('-', '_')}(", sorted((root / "tests" / "ops").glob("test_*.py"))
    found = [file for file in files if call in file.read_text(encoding="utf-8")]
    if not found:
        raise CannotRun("bench --base", f"no test calls {call}...)", "Write one: no gain is shown without.")
    return found


def _stem(spec: str) -> str:
    return spec.partition(":")[0].strip().replace("-", "_")


def side_by_side(rev: str, words: Sequence[str], bar: Bar) -> list[dict[str, Any]]:
    """`saccade bench` with these words, in turns at `rev` and here: seconds of both and their ratio, turn by turn.

    Raises:
        CannotRun: no such commit, or it cannot run that.
    """
    root = _root()
    with _worktree(root, rev) as base:
        turns = []
        for turn in range(TURNS):
            bar(2 * turn, 2 * TURNS, f"{rev}, turn {turn + 1}")
            before = _times(base / "src", words, rev)
            bar(2 * turn + 1, 2 * TURNS, f"here, turn {turn + 1}")
            turns.append((before, _times(root / "src", words, "this checkout")))
    shared = [key for key in turns[0][1] if all(key in side for pair in turns for side in pair)]
    return [_row(key, [(before[key], now[key]) for before, now in turns]) for key in shared]


@contextlib.contextmanager
def _worktree(root: Path, rev: str) -> Iterator[Path]:
    """The files of a commit beside this checkout, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "base"
        git = ["git", "-C", str(root), "worktree"]
        done = subprocess.run([*git, "add", "--detach", str(at), rev], capture_output=True, text=True)
        if done.returncode:
            raise CannotRun(f"bench --base {rev}", done.stderr.strip().splitlines()[-1], "Name a commit of this clone.")
        try:
            yield at
        finally:
            subprocess.run([*git, "remove", "--force", str(at)], capture_output=True, check=True)


def _times(source: Path, words: Sequence[str], where: str) -> dict[Key, float]:
    """Seconds by op or method, length and back end or stage, in a process that imports saccade from `source`."""
    environ = {**os.environ, "PYTHONPATH": str(source)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", START, "bench", *words, "--json", "--quiet"]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines() or ["it said nothing"]
        raise CannotRun(f"bench in {where}", last[-1].rstrip("."), "Name a commit that has this verb and these names.")
    found = json.loads(done.stdout)
    times = {(row["op"], row["tokens"], row["impl"]): row["seconds"] for row in found["ops"]}
    for row in found["methods"]:
        times |= {(row["label"], row["tokens"], stage): row[f"{stage}_seconds"] for stage in ("prefill", "decode")}
    return times


def _row(key: Key, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    ratios = [before / now for before, now in pairs]
    seconds = [statistics.median(side) for side in zip(*pairs)]
    spread = {"ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return dict(zip(("name", "tokens", "what", "base_seconds", "seconds"), (*key, *seconds))) | spread
