"""Twelve names, loaded when they are used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import saccade
from saccade.core.errors import CannotRun

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


@pytest.mark.parametrize("folder", ["attach", "report"])
def test_a_folder_of_the_same_name_does_not_hide_the_function(folder):
    code = f"import saccade, saccade.{folder}; print(callable(saccade.{folder}))"
    assert printed(code) == "True"
    assert printed(f"import saccade; saccade.{folder}; import saccade.{folder} as m; print(callable(m))") == "True"


def test_the_version_is_the_packages():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("saccade") == saccade.__version__
    except PackageNotFoundError:
        pytest.skip("not installed, only on the path")


def test_replace_refuses_in_words_while_there_is_no_mixer():
    with pytest.raises(CannotRun, match=r"replace layers \[0, 2\] by 'gla': no mixer is registered yet\. See: saccade l"):
        saccade.replace(None, [0, 2], "gla")
