"""The process itself: fast without torch, quiet when its reader leaves, plain where nobody looks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

import saccade
from saccade.cli import VERBS, main, overview, parser

QUICK = (["--help"], ["list"], ["show", "snapkv"], ["--version"])


def process(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **changes})


@pytest.mark.parametrize("given", QUICK, ids=" ".join)
def test_what_must_be_quick_imports_no_torch_and_takes_half_a_second(given):
    code = f"import sys; from saccade.cli import main; main({given}); sys.exit('torch' in sys.modules)"
    spent: list[float] = []
    # the processor's time of the best of three: other people's work on the machine counts for nothing
    while len(spent) < 3 and min(spent, default=1.0) >= 0.5:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = process(sys.executable, "-c", code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and done.stdout and not done.stderr
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


def test_every_help_is_torch_free():
    verbs = [v for group in VERBS.values() for v in group]
    code = f"import sys; from saccade.cli import parser; [parser(v) for v in {verbs}]; sys.exit('torch' in sys.modules)"
    assert process(sys.executable, "-c", code).returncode == 0


def test_a_reader_that_leaves_is_no_error():
    done = process("bash", "-c", f"set -o pipefail; {sys.executable} -m saccade list --json | head -1")
    assert done.stdout == "{\n" and not done.stderr


@pytest.mark.parametrize("changes", [{}, {"NO_COLOR": "1"}])
def test_what_goes_into_a_pipe_has_no_colour_and_no_cut_lines(changes):
    done = process(sys.executable, "-m", "saccade", "list", COLUMNS="40", **changes)
    assert "\x1b" not in done.stdout and "…" not in done.stdout
    assert saccade.get("snapkv").card.summary in done.stdout


def test_the_module_is_the_command():
    done = process(sys.executable, "-m", "saccade", "--version")
    assert (done.returncode, done.stdout) == (0, f"{saccade.__version__}\n")


def test_without_a_verb_the_overview_is_wrong_usage(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.strip() == overview()


def test_help_is_said_and_is_no_error(capsys):
    assert main(["compare", "--help"]) == 0
    assert parser("compare").format_help() == capsys.readouterr().out
