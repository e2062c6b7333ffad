"""Tests of a `case` run for every registered method in all of its forms, those of a `plain` case for each as it comes,
those of a `probe` for each that reads only, those of a `layer` for each that is trained; `--method NAME` leaves one.

A test marked `claims("chunks")` is expected to fail, and must, for a method whose card gives a reason against "chunks":
a limitation that is none turns the suite red. A card speaks of the method as it comes; other forms of it may be better.
"""

from __future__ import annotations

import pytest

from saccade.core.errors import CannotRun
from saccade.core.registry import list_methods
from tests.conformance.cases import cases, layers

KINDS = {"case", "plain", "probe", "layer"}


def pytest_addoption(parser):
    parser.addoption("--method", metavar="NAME", action="append", help="only this method (conformance); repeatable")


def pytest_configure(config):
    config.addinivalue_line("markers", "claims(name): a property of core.card.PROPERTIES, excused by a card's reason")


def pytest_generate_tests(metafunc):
    taken = KINDS & set(metafunc.fixturenames)
    if not taken:
        return
    only = [name.replace("_", "-") for name in metafunc.config.getoption("--method", default=None) or []]
    if not set(only) <= set(list_methods()):
        raise pytest.UsageError(f"--method {' '.join(only)}: no such method is registered")
    every = layers() if taken == {"layer"} else cases()
    some = [case for case in every if not only or case.name in only]
    if taken & {"plain", "probe"}:
        some = [case for case in some if not case.option and (taken == {"plain"} or "observe" in case.parts)]
    metafunc.parametrize(*taken, [_param(case, metafunc.definition) for case in some])


def _param(case, test):
    claim = test.get_closest_marker("claims")
    reason = case.card.lacks.get(claim.args[0], "") if claim else ""
    if "layer" in test.fixturenames and case.card.family != "mixers":
        reason = ""  # what a method says of itself attached need not hold of the attention layer around it
    lacking = (AssertionError, CannotRun)  # not had, or refused
    marks = [pytest.mark.xfail(reason=reason, strict=not case.option, raises=lacking)] if reason else []
    return pytest.param(case, id=str(case), marks=marks)


def pytest_collection_modifyitems(config, items):
    """Under --method, tests that are about no method are left out."""
    if config.getoption("--method", default=None):
        here = str(config.rootpath / "tests" / "conformance")
        drop = [i for i in items if str(i.path).startswith(here) and not KINDS & set(i.fixturenames)]
        items[:] = [i for i in items if i not in drop]
        config.hook.pytest_deselected(items=drop)
