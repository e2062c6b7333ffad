"""Twelve names, loaded when they are used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import saccade
from saccade.core.errors import CannotRun
from tests import processes

NAMES = {
    "attach",
    "compare",
    "claim",
    "explain",
    "calibrate",
    "replace",
    "list_methods",
    "get",
    "Budget",
    "Method",
    "load",
    "report",
}


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_there_are_twelve():
    assert set(saccade.__all__) == NAMES and len(NAMES) == 12
    assert {n for n in dir(saccade) if not n.startswith("_")} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_is_there_documented_and_no_stub(name):
    thing = getattr(saccade, name)
    assert callable(thing) and not inspect.ismodule(thing)
    assert inspect.getdoc(thing), f"saccade.{name} has no docstring"
    assert "NotImplementedError" not in inspect.getsource(thing) or inspect.isclass(thing)
    assert getattr(saccade, name) is thing


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(AttributeError, match=r"module 'saccade' has no attribute 'attack'; it has attach, compare, cl"):
        _ = saccade.attack  # type: ignore[attr-defined]


def test_importing_is_light():
    code = "import sys, saccade; saccade.list_methods(); saccade.Budget(0.5); print('torch' in sys.modules)"
    assert printed(code) == "False"


def test_folders_of_the_same_name_do_not_hide_the_functions():
    import saccade.attach
    import saccade.report

    assert inspect.isfunction(saccade.attach) and inspect.isfunction(saccade.report)
    # and where the folders are imported before the functions were ever asked for
    code = "import saccade.attach, saccade.report; print(callable(saccade.attach), callable(saccade.report))"
    assert processes.run("builtins:exec", code) == (0, "True True\n")


def test_the_version_is_the_packages():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("saccade") == saccade.__version__
    except PackageNotFoundError:
        pytest.skip("not installed, only on the path")


def test_replace_refuses_in_words():
    said = r"replace layers \[0, 2\] by 'gla': layers of a loaded model are not swapped in this version"
    with pytest.raises(CannotRun, match=said):
        saccade.replace(None, [0, 2], "gla")
