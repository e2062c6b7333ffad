"""Tests of a `case` run for every registered method in all of its forms; those of a `plain` case for each as it comes;
those of an `owner` for each as it comes and where a choice makes it own other parts: they are about attaching, which no
other choice reaches; those of a `keeper` for each as it comes of the families cache and decode; those of a `probe` for
each that reads only, those of a `layer` for each that is trained; `--method NAME` leaves one method.

A test marked `claims("chunks")` is expected to fail, and must, for a method whose card gives a reason against "chunks":
a limitation that is none turns the suite red. A card speaks of the method as it comes; other forms of it may be better.
"""

from __future__ import annotations

import pytest

from saccade.core.errors import CannotRun
from saccade.core.registry import list_methods
from tests.conformance.cases import Case, cases, layers

KINDS = {
    "case": lambda case: True,
    "plain": lambda case: not case.option,
    "owner": lambda case: not case.option or case.parts != Case(case.name).parts,
    "keeper": lambda case: not case.option and case.card.family in ("cache", "decode"),
    "probe": lambda case: not case.option and "observe" in case.parts,
    "layer": lambda case: True,
}


def pytest_addoption(parser):
    parser.addoption("--method", metavar="NAME", action="append", help="only this method (conformance); repeatable")


def pytest_configure(config):
    config.addinivalue_line("markers", "claims(name): a property of core.card.PROPERTIES, excused by a card's reason")


def pytest_generate_tests(metafunc):
    taken = [kind for kind in KINDS if kind in metafunc.fixturenames]
    if not taken:
        return
    only = [name.replace("_", "-") for name in metafunc.config.getoption("--method", default=None) or []]
    if not set(only) <= set(list_methods()):
        raise pytest.UsageError(f"--method {' '.join(only)}: no such method is registered")
    (kind,) = taken
    every = layers() if kind == "layer" else cases()
    some = [case for case in every if (not only or case.name in only) and KINDS[kind](case)]
    metafunc.parametrize(kind, [_param(case, metafunc.definition) for case in some])


def _param(case, test):
    claim = test.get_closest_marker("claims")
    reason = case.card.lacks.get(claim.args[0], "") if claim else ""
    if "layer" in test.fixturenames and case.card.family != "mixers":
        reason = ""  # what a method says of itself attached need not hold of the attention layer around it
    how = {"strict": True, "raises": (AssertionError, CannotRun)}  # not had, or refused
    how = {"run": False} if case.option else how  # it may be better or not: either would do
    marks = [pytest.mark.xfail(reason=reason, **how)] if reason else []
    return pytest.param(case, id=str(case), marks=marks)


def pytest_collection_modifyitems(config, items):
    """Under --method, tests that are about no method are left out."""
    if config.getoption("--method", default=None):
        here = str(config.rootpath / "tests" / "conformance")
        drop = [i for i in items if str(i.path).startswith(here) and not KINDS.keys() & set(i.fixturenames)]
        items[:] = [i for i in items if i not in drop]
        config.hook.pytest_deselected(items=drop)
