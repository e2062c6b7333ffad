"""Where the files of a method lie: in a source checkout, or in a package of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from saccade.core import registry

PACKAGE = Path(__file__).parents[1]


class Files(NamedTuple):
    """One method: its own file, its test and its claim, there or not."""

    method: Path
    test: Path
    claim: Path


def checkout() -> Path | None:
    """The root of the source checkout that this is run from; None for an installed copy."""
    root = PACKAGE.parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "tests" / "methods").is_dir() else None


def in_checkout(root: Path, family: str, stem: str) -> Files:
    """The three files of one of our methods."""
    ours = root / "src" / "saccade"
    test = root / "tests" / "methods" / f"test_{stem}.py"
    return Files(ours / "methods" / family / f"{stem}.py", test, ours / "claims" / f"{stem}.py")


def in_package(root: Path, stem: str) -> Files:
    """The three files of a method that lives in a package of its own."""
    package = root / f"saccade_{stem}"
    return Files(package / f"{stem}.py", root / "tests" / f"test_{stem}.py", package / f"{stem}_claim.py")


def files(name: str) -> Files:
    """Of a registered method."""
    method = registry.source(name)[0]
    root = checkout()
    if method.is_relative_to(PACKAGE):
        return in_checkout(root or PACKAGE.parents[1], method.parent.name, method.stem)
    return in_package(method.parents[1], method.stem)


def run_tests(target: Path, *more: str) -> subprocess.CompletedProcess[str] | None:
    """pytest on a file or folder, on the copy of saccade that asks; None where pytest is not installed."""
    if importlib.util.find_spec("pytest") is None:
        return None
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=no", *more, str(target)]
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(command, cwd=checkout() or target.parent, env=environ, capture_output=True, text=True)
