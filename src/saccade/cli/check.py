"""all that a method must pass: card, own tests, conformance, smoke claim; says what is missing"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from saccade.cli.console import note, say_json, say_table
from saccade.cli.options import add_json
from saccade.cli.tree import PACKAGE, Files, checkout, files
from saccade.core import registry

EXAMPLE = "saccade check my-method"
TAIL_LINES = 25  # of a failed pytest that are shown
Finding = tuple[str, str, str]  # ok, todo, fail or -; what; in words


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `check` takes."""
    parser.add_argument("name", metavar="METHOD", help="as `saccade list` names it")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """1 where anything fails or is still to be done."""
    name = registry.card(args.name).name
    at, found = files(name), []
    for finding in _findings(name, at):
        found.append(finding)
        if not args.quiet:
            note(f"{finding[0]}: {finding[1]}")
    if args.json:
        say_json([dict(zip(("state", "what", "found"), finding)) for finding in found])
    else:
        say_table(("state", "what", "found"), found)
    return 1 if any(state in ("fail", "todo") for state, _, _ in found) else 0


def _findings(name: str, at: Files) -> Iterator[Finding]:
    yield _card(name)
    yield _todo(at)
    yield _pytest("own tests", at.test, [])
    root = checkout()
    conformance = root and root / "tests" / "conformance"
    if conformance and conformance.is_dir():
        yield _pytest("conformance", conformance, ["--method", name])
    else:
        yield "-", "conformance", "these tests lie in the source checkout: run this there, with the method installed"
    yield _claim(at)


def _card(name: str) -> Finding:
    card, docstring = registry.card(name), str(registry.get(name).__doc__)
    lacking = [field for field in ("title", "summary", "budget") if not getattr(card, field)]
    if not card.baseline:
        lacking += [field for field in ("paper", "authors") if not getattr(card, field)]
        lacking += [] if "Source:" in docstring else ["the docstring's line `Source:`"]
    return ("fail", "card", f"it lacks {', '.join(lacking)}") if lacking else ("ok", "card", card.title)


def _todo(at: Files) -> Finding:
    marks = []
    for file in at:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        numbers = [str(number) for number, line in enumerate(lines, 1) if re.search(r"\bTODO\b", line)]
        marks += [f"{file.name}: line {', '.join(numbers)}"] if numbers else []
    return ("todo", "TODO marks", "; ".join(marks)) if marks else ("ok", "TODO marks", "none left")


def _pytest(what: str, target: Path, more: list[str]) -> Finding:
    if not target.exists():
        return "fail", what, f"there is no {target}"
    if importlib.util.find_spec("pytest") is None:
        return "fail", what, 'pytest is missing: pip install "saccade[test]"'
    root = checkout() or target.parent
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(target), *more]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest said nothing"]
    if done.returncode:
        note("\n".join(lines[-TAIL_LINES:]))
    return ("fail" if done.returncode else "ok"), what, lines[-1].strip("= ")


def _claim(at: Files) -> Finding:
    if not at.claim.is_file():
        return "fail", "smoke claim", f"there is no {at.claim}"
    spec = importlib.util.spec_from_file_location(f"claim_of_{at.method.stem}", at.claim)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    evidence = module.measure("smoke", None)
    failed = [f"{c.name}: {c.value:.3g}, bar {c.bar:.3g}" for c in evidence.checks if not c.holds]
    return ("fail" if failed else "ok"), "smoke claim", "; ".join([evidence.verdict, *failed])
