"""What README and how-tos show works: command lines are understood, code blocks run, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from saccade import models
from saccade.cli import parser
from saccade.core import errors as kinds

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """`saccade ...` in blocks and in running text."""
    text = page.read_text(encoding="utf-8")
    lines = [c for block in blocks(page, "bash") for line in block.splitlines() for c in line.split("&&")]
    lines += [code for code in re.findall(r"`(saccade [^`\n]+)`", text) if "..." not in code]
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "saccade"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_command_lines_are_understood(page):
    for _, verb, *rest in commands(page):
        if verb.startswith("-"):
            assert verb in ("--help", "--version")
            continue
        parser(verb).parse_args([{"NAME": "snapkv", "N": "1", "RUN_DIR": "x"}.get(word, word) for word in rest])


def test_there_are_command_lines_to_check():
    assert len(commands(ROOT / "README.md")) >= 5


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{named(page)} links to {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "methods"], ids=named)
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        compile(block, named(page), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/attach.md", "docs/budgets.md", "docs/calibrate.md"])
def test_python_blocks_run(page):
    if not models.is_cached("smollm2"):
        pytest.skip("the default model has not been fetched")
    names: dict = {}
    for block in blocks(ROOT / page, "python"):
        exec(block, names)


def test_the_page_of_errors_is_complete_and_right():
    rows = re.findall(r"^\| `(\w+)` \|.*\| `?(\w+)`? \| (\d) \|$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    ours = {k: v for k, v in vars(kinds).items() if isinstance(v, type) and issubclass(v, kinds.SaccadeError)}
    assert {name for name, _, _ in rows} == set(ours) - {"SaccadeError"}
    for name, kin, code in rows:
        assert ours[name].exit_code == int(code)
        assert kin in [base.__name__ for base in ours[name].__mro__]
