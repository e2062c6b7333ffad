"""Property 13, of the whole: what is documented is raised somewhere, names nobody knows, what third parties bring."""

from __future__ import annotations

import ast
import inspect
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from saccade import models
from saccade.attach import attach
from saccade.core import errors, registry
from saccade.core.errors import BugInSaccade, ModelUnavailable, SaccadeError, UnknownName
from saccade.core.registry import get
from tests.conformance.cases import cases, tiny

TESTS = Path(__file__).parent.parent


def raised_in(files) -> set[str]:
    """Error classes that tests expect together with a text."""
    calls = [n for f in files for n in ast.walk(ast.parse(f.read_text("utf-8"))) if isinstance(n, ast.Call)]
    expected = [c for c in calls if ast.unparse(c.func) in ("pytest.raises", "raises")]
    named = [n for c in expected if any(k.arg == "match" for k in c.keywords) for a in c.args for n in ast.walk(a)]
    return {ast.unparse(n).rpartition(".")[2] for n in named if isinstance(n, (ast.Name, ast.Attribute))}


def test_13_every_class_of_error_is_raised_by_some_test():
    raised = raised_in(TESTS.rglob("test_*.py"))
    classes = {n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, SaccadeError)}
    assert classes - {"SaccadeError"} - raised == set(), "no test reads the text of these"


@pytest.mark.claims("errors")
def test_13_what_the_docstring_raises_a_test_raises(plain):
    doc = inspect.getdoc(get(plain.name)) or ""
    documented = set(re.findall(r"^ {4}(\w+): ", doc.partition("Raises:")[2], re.MULTILINE))
    own = TESTS / "methods" / f"test_{plain.name.replace('-', '_')}.py"
    assert documented - raised_in([own] if own.exists() else []) == set()


@pytest.mark.parametrize("there", ["junk.gguf", "a folder", "nothing"])
def test_13_a_model_that_cannot_be_read(there, tmp_path):
    """A file that is none, an empty folder, nothing at all: without a network, in one sentence."""
    (tmp_path / "junk.gguf").write_bytes(b"no model")
    (tmp_path / "a folder").mkdir()
    with pytest.raises(ModelUnavailable, match=re.escape(there)):
        models.load(str(tmp_path / there))


def test_13_an_unknown_name_says_the_nearest():
    for case in cases():
        with pytest.raises(UnknownName, match=f"no method '{case.name}x'.*Did you mean .*'{case.name}'"):
            attach(tiny(4, 2, 16), case.name + "x")


def test_13_a_third_party_is_under_test_or_its_mistake_is_said(tmp_path, monkeypatch):
    """Entry points become cases; a module without a card, or without the class, is named."""
    source = inspect.getsource(inspect.getmodule(get("streaming")))
    (tmp_path / "theirs.py").write_text(source.replace('name="streaming"', 'name="theirs"'))
    (tmp_path / "bare.py").write_text("class Bare:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = [EntryPoint(n, f"{n}:{c}", "saccade.methods") for n, c in (("theirs", "Streaming"), ("bare", "Bare"))]
    caches = [f for f in vars(registry).values() if hasattr(f, "cache_clear")]
    try:
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(registry, "entry_points", lambda group: entries[:1])
        assert "theirs" in map(str, cases())
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)
        with pytest.raises(BugInSaccade, match=r"the card of 'bare'.*bare\.py holds no class"):
            cases()
    finally:
        for cache in caches:
            cache.cache_clear()
