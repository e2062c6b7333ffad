"""all that a method must pass: card, own tests, conformance, smoke claim; says what is missing"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from saccade.cli.console import Bar, note, say_json, say_table
from saccade.cli.options import add_json
from saccade.cli.tree import Files, checkout, files, run_tests
from saccade.core import registry

EXAMPLE = "saccade check my-method"
Finding = tuple[str, str]  # ok, todo, fail or -; in words


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `check` takes."""
    parser.add_argument("name", metavar="METHOD", help="as `saccade list` names it")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """1 where anything fails or is still to be done."""
    name, found = registry.card(args.name).name, []
    at = files(name)
    with Bar(args.quiet) as bar:
        for done, (what, step) in enumerate(STEPS.items()):
            bar(done, len(STEPS), what)
            state, words = step(name, at)
            found.append((state, what, words))
    if args.json:
        say_json([dict(zip(("state", "what", "found"), finding)) for finding in found])
    else:
        say_table(("state", "what", "found"), found)
    return 1 if any(state in ("fail", "todo") for state, _, _ in found) else 0


def _card(name: str, at: Files) -> Finding:
    card, docstring = registry.card(name), str(registry.get(name).__doc__)
    lacking = [field for field in ("title", "summary", "budget") if not getattr(card, field)]
    if not card.baseline:
        lacking += [field for field in ("paper", "authors") if not getattr(card, field)]
        lacking += [] if "Source:" in docstring else ["the docstring's line `Source:`"]
    return ("fail", f"it lacks {', '.join(lacking)}") if lacking else ("ok", card.title)


def _todo(name: str, at: Files) -> Finding:
    marks = []
    for file in at:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        numbers = [str(number) for number, line in enumerate(lines, 1) if re.search(r"\bTODO\b", line)]
        marks += [f"{file.parent.name}/{file.name}: line {', '.join(numbers)}"] if numbers else []
    return ("todo", "; ".join(marks)) if marks else ("ok", "none left")


def _own_tests(name: str, at: Files) -> Finding:
    return _pytest(at.test, []) if at.test.is_file() else ("fail", f"there is no {at.test}")


def _conformance(name: str, at: Files) -> Finding:
    root = checkout()
    if root is None or not (root / "tests" / "conformance").is_dir():
        return "-", "these tests lie in the source checkout: run this there, with the method installed"
    return _pytest(root / "tests" / "conformance", ["--method", name])


def _pytest(target: Path, more: list[str]) -> Finding:
    done = run_tests(target, *more)
    if done is None:
        return "fail", 'pytest is missing: pip install "saccade[test]"'
    lines = (done.stdout + done.stderr).strip().splitlines() or ["pytest said nothing"]
    if done.returncode:
        note("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))))
        note(f"See why: {shlex.join(['pytest', str(target), *more])}")
    return ("fail" if done.returncode else "ok"), lines[-1].strip("= ")


def _claim(name: str, at: Files) -> Finding:
    if not at.claim.is_file():
        return "fail", f"there is no {at.claim}"
    spec = importlib.util.spec_from_file_location(f"claim_of_{at.method.stem}", at.claim)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    evidence = module.measure("smoke", None)
    failed = [f"{c.name}: {c.value:.3g}, bar {c.bar:.3g}" for c in evidence.checks if not c.holds]
    return ("fail" if failed else "ok"), "; ".join([evidence.verdict, *failed])


STEPS: dict[str, Callable[[str, Files], Finding]] = {
    "card": _card,
    "TODO marks": _todo,
    "own tests": _own_tests,
    "conformance": _conformance,
    "smoke claim": _claim,
}
