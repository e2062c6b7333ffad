"""Errors say what was asked, what was found and what to do; each class says how a command ends."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.core import errors
from saccade.core.errors import BadOption, CannotRun, SaccadeError, UnknownName

WORDS = st.text("abc xyz", min_size=1)
EXIT_CODES = {
    "SaccadeError": 1,
    "UnknownName": 2,
    "BadOption": 2,
    "BadBudget": 2,
    "BadInput": 2,
    "CannotRun": 3,
    "DoesNotCompose": 3,
    "BadArtefact": 3,
    "ModelUnavailable": 3,
    "CorruptResult": 1,
    "BugInSaccade": 1,
}


@given(WORDS, WORDS, WORDS)
def test_one_finding_makes_one_line(asked, found, do):
    e = SaccadeError(asked, found, do)
    assert str(e) == f"{asked}: {found}. {do}" and e.found == [found]
    assert str(SaccadeError(asked, found)) == f"{asked}: {found}."


@given(WORDS, st.lists(WORDS, min_size=2), WORDS)
def test_several_findings_make_a_list(asked, found, do):
    lines = str(SaccadeError(asked, found, do)).split("\n")
    assert lines == [asked, *(f"  - {reason}" for reason in found), do]
    assert str(SaccadeError(asked, found)).split("\n") == lines[:-1]


def test_exit_codes_and_builtin_kin():
    classes = {k: v for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, SaccadeError)}
    assert {name: c.exit_code for name, c in classes.items()} == EXIT_CODES
    for name, kin in {"UnknownName": LookupError, "BadOption": ValueError, "CannotRun": RuntimeError}.items():
        assert issubclass(classes[name], kin), "who catches the builtin catches ours"


def test_an_unknown_name_says_the_nearest():
    said = r"no method 'snapvk': 3 are known\. Did you mean 'snapkv'\? See them with: saccade list"
    with pytest.raises(UnknownName, match=said) as e:
        raise UnknownName("method", "snapvk", ["snapkv", "hip", "full"], "See them with: saccade list")
    assert e.value.close == ["snapkv"]
    assert str(UnknownName("task", "zzz", ["passkey"], "Look.")) == "no task 'zzz': 1 are known. Look."
    assert "Did you mean 'duo-attention'?" in str(UnknownName("method", "duo_atention", ["duo-attention"], "Look."))


def test_bad_option_is_no_cannot_run():
    assert not issubclass(BadOption, CannotRun)


def test_errors_come_whole_from_another_process():
    unknown = UnknownName("method", "snapvk", ["snapkv"], "See.")
    for e in (CannotRun("a", ["b", "c"], "d."), unknown, BadOption("a", "b")):
        again = pickle.loads(pickle.dumps(e))
        assert (type(again), str(again), vars(again)) == (type(e), str(e), vars(e))
