"""The house: four files for a method, short functions, docstrings, no trace of anybody's machine."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from saccade.core import registry

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "saccade"
FILES = sorted(PACKAGE.rglob("*.py"))
MACHINE = re.compile(r"(?<![\w.])/(work|root|home|Users)/\w")
MOST_LINES = 60
TEXT = {".py", ".md", ".toml", ".json", ".jsonl", ".txt", ".css", ".js", ".jinja", ".yml", ".html", ""}


def tracked() -> list[Path]:
    """Files of the repository; without git (an unpacked archive), all that are there."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split("\n") if done.returncode == 0 else [str(p) for p in ROOT.rglob("*") if p.is_file()]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@functools.cache  # several tests look at every file
def tree(file: Path) -> ast.Module:
    """Its syntax."""
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def nodes(file: Path) -> list[ast.AST]:
    """All of it."""
    return list(ast.walk(tree(file)))


def functions(file: Path):
    """(node, name with its class) of every function of a module or class, those inside functions left out."""
    for node in tree(file).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for one in [node, *inner]:
            if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield one, f"{node.name}.{one.name}" if one is not node else one.name


def short(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("name", registry.list_methods())
def test_a_method_is_a_file_a_test_a_claim_and_a_page(name):
    stem = name.replace("-", "_")
    family = registry.card(name).family
    wanted = {
        PACKAGE / "methods" / family / f"{stem}.py",
        ROOT / "tests" / "methods" / f"test_{stem}.py",
        PACKAGE / "claims" / f"{stem}.py",
        ROOT / "docs" / "methods" / f"{stem}.md",
    }
    missing = [str(file.relative_to(ROOT)) for file in wanted if not file.is_file()]
    assert not missing, f"{name} lacks {missing}"


def test_functions_are_short():
    every = ((f"{short(file)}: {name}", n) for file in FILES for n, name in functions(file) if not is_kernel(n))
    lengths = {name: n.end_lineno - n.lineno + 1 for name, n in every}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def is_kernel(node: ast.FunctionDef) -> bool:
    """Compiled by Triton, which passes dozens of numbers by position: these may be long."""
    return any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)


def test_the_median_function_is_short():
    lengths = sorted(n.end_lineno - n.lineno + 1 for file in FILES for n, _ in functions(file))
    assert lengths[len(lengths) // 2] <= 12


def test_modules_and_public_functions_have_docstrings():
    silent = [short(file) for file in FILES if tree(file).body and not ast.get_docstring(tree(file))]
    assert not silent, f"modules that say nothing: {silent}"
    every = [(file, node, name) for file in FILES for node, name in functions(file)]
    public = [(file, node, name) for file, node, name in every if not any(x.startswith("_") for x in name.split("."))]
    bare = [(short(file), name) for file, node, name in public if not ast.get_docstring(node)]
    # an override says what its base says
    bare = [(at, name) for at, name in bare if "." not in name or name.split(".")[1] not in documented_in_bases()]
    assert not bare, f"without a docstring: {bare}"


@functools.cache
def documented_in_bases() -> set[str]:
    """Methods that the base classes of ours document, and those that other libraries name."""
    names = ("core/method.py", "core/selection.py", "tasks/_base.py", "tasks/_needles.py", "tasks/training/_base.py")
    bases = [PACKAGE / name for name in names]
    ours = {name.split(".")[1] for file in bases for n, name in functions(file) if "." in name and ast.get_docstring(n)}
    return ours | {"forward", "backward", "error"}  # the last is argparse's


def test_method_files_are_of_a_size_to_read():
    lengths = {short(f): len(f.read_text("utf-8").splitlines()) for f in (PACKAGE / "methods").rglob("*.py")}
    assert not {name: lines for name, lines in lengths.items() if lines > 270}, "part of it is an op"


def test_no_trace_of_a_machine():
    found = []
    for file in tracked():
        if file.suffix in TEXT and file != Path(__file__):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [f"{file.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if MACHINE.search(line)]
    assert not found


def test_nothing_catches_everything():
    for file in FILES:
        for node in nodes(file):
            if isinstance(node, ast.ExceptHandler):
                wide = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                passes = all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body)
                assert not (wide and passes), f"{short(file)}:{node.lineno} hides every error"


def test_seeds_come_from_one_place():
    makers = (".manual_seed", "random.seed", "default_rng", "RandomState", "random.Random", "set_seed")
    calls = [(f, n) for f in FILES for n in nodes(f) if isinstance(n, ast.Call)]
    seeding = [(f, ast.unparse(n)) for f, n in calls if ast.unparse(n.func).endswith(makers)]
    assert [f for f, _ in seeding].count(PACKAGE / "core" / "rng.py") == 2, "the test no longer sees what it must"
    assert not [(short(f), call) for f, call in seeding if "seed_of(" not in call]


def test_generated_pages_are_up_to_date():
    spec = importlib.util.spec_from_file_location("saccade_docs_make", ROOT / "docs" / "make.py")
    assert spec is not None and spec.loader is not None, "docs/make.py is gone"
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.stale() == [], "run: python docs/make.py"
