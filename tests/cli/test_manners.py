"""What all verbs share: help with an example, errors in three parts, exit codes."""

from __future__ import annotations

import shlex

import pytest

import saccade
from saccade.cli import VERBS, list, main, overview, parser
from saccade.core import errors

EVERY = [verb for group in VERBS.values() for verb in group]


@pytest.mark.parametrize("verb", EVERY)
def test_every_verb_has_a_line_in_the_overview_and_an_example_that_parses(verb):
    made = parser(verb)
    assert f"  {verb} " in overview()
    command, named, *given = shlex.split(made.epilog.removeprefix("example:\n"))
    assert (command, named) == ("saccade", verb)
    made.parse_args(given)
    undocumented = [a.dest for a in made._actions if not a.help]
    assert not undocumented


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["compair"], 2, "UnknownName: no verb 'compair': 17 are known. Did you mean 'compare' or"),
        (["show", "snapkw"], 2, "Did you mean 'snapkv'? See them with: saccade list"),
        (["list", "--family", "chache"], 2, "WrongUsage: saccade list: argument --family: invalid choice: 'chache'"),
        (["list", "--jsn"], 2, "unrecognized arguments: --jsn"),
        (["run", "hello", "--budget", "0"], 2, "BadBudget: budget=0.0: it keeps nothing. Give a fraction kept"),
        (["run", "hello", "--method", "snapkv+knorm"], 3, "DoesNotCompose: attach [snapkv, knorm] together: both need"),
        (["run", "hello", "--new-tokens", "0"], 2, "BadOption: --new-tokens 0: nothing is to be written. Give 1 or"),
        (["run", "-f", "/no/such/file"], 2, "BadInput: read /no/such/file: No such file or directory. Give a plain"),
        (["run", " "], 2, 'BadInput: run without a prompt: there is no text. Give one: saccade run "...", or -f FILE.'),
        (["run", "hello", "--model", "/no/model"], 3, "ModelUnavailable: cannot load '/no/model'"),
        (["explain", "a", "b", "full"], 2, "BadOption: explain 'full': 2 before it. Name one model and one method"),
        (["explain", "a", "full", "--model", "b"], 2, "1 names before it, and --model b. Name one model and one"),
        (["power", "--effect", "0"], 2, "BadOption: --effect 0: it must be above zero. Give the difference to be seen"),
        (["power", "--count", "1"], 2, "BadOption: --count 1: one sample shows no spread. Give 2 or more."),
        (["power", "--correlation", "1"], 2, "BadOption: --correlation 1: it lies outside [0, 1). Leave it away"),
        (["power", "--task", "los"], 2, "no task 'los'"),
        (["report", "/no/run"], 2, "BadInput: a report on /no/run: there is no such folder. Make a run: saccade"),
        (["calibrate", "snapkv+minference"], 2, "that is not one method and some text. Name one method, and numbers"),
        (["claim"], 2, "BadOption: claim: no method is named. Give either names, or --all."),
        (["claim", "hip", "--all"], 2, "BadOption: claim --all: methods are named besides. Give either names, or"),
        (["claim", "hop", "--tier", "smoke"], 2, "UnknownName: no method 'hop'"),
        (["new", "My_Method", "--family", "cache"], 2, "BadOption: new 'My_Method': that is no registry name. Write"),
        (["new", "hip", "--family", "cache"], 2, "BadOption: new 'hip': a method of that name exists. Choose another"),
        (["serve", "--host", "0.0.0.0"], 3, "CannotRun: listen on 0.0.0.0: others can reach that address, and"),
        (["serve", "--cache", "0.5"], 2, "BadOption: --cache 0.5: that is no number of bytes. Give one: 2GiB."),
        (["serve", "--batch", "0"], 2, "BadOption: batch=0: it must be 1 or more. Give such a number."),
        (["serve", "--api-key", ""], 2, "BadOption: an API key: it is empty, or holds what a header cannot carry."),
        (["serve", "--method", "knorm", "--method", "snapkv"], 3, "DoesNotCompose: attach [knorm, snapkv] together"),
        (["train"], 2, "WrongUsage: saccade train: the following arguments are required: --task"),
        (["train", "--task", "digit"], 2, "UnknownName: no training task 'digit': 7 are known. Did you mean 'digits'"),
        (["train", "--task", "mqar", "--mixer", "knorm"], 3, "CannotRun: train 'knorm' in a net: it selects nothing"),
        (["train", "--task", "mqar", "--rows", "0"], 2, "BadOption: rows=0: it must be above zero. Give such a number"),
        (["check", "hop"], 2, "UnknownName: no method 'hop'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, type([])) else "",
)
def test_errors_say_what_to_do_and_end_with_their_code(given, code, said, capsys):
    assert main(given) == code
    out, err = capsys.readouterr()
    assert not out and said in err and "Traceback" not in err


def test_debug_shows_where_an_error_comes_from(capsys):
    assert main(["show", "snapkw", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [errors.CannotRun, errors.BadOption, errors.CorruptResult])
def test_the_exit_code_is_the_error_s_own(error, monkeypatch):
    monkeypatch.setattr(list, "run", lambda args: (_ for _ in ()).throw(error("asked", "found", "do")))
    assert main(["list"]) == error.exit_code


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_comparison_says_that_it_resumes(monkeypatch, capsys):
    monkeypatch.setattr(saccade, "compare", interrupt, raising=False)
    assert main(["compare", "--quick", "--tasks", "loss", "--methods", "snapkv"]) == 130
    assert capsys.readouterr().err.endswith("Interrupted. Finished cells are kept; the same command resumes.\n")


def test_another_interrupted_verb_says_that_it_does_not(monkeypatch, capsys):
    monkeypatch.setattr(list, "run", interrupt)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "\nInterrupted. The same command starts anew.\n"
