"""Names come from the folder and from entry points; listing imports nothing heavy; nothing can be written."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from saccade.core import registry
from saccade.core.card import Card
from saccade.core.errors import BugInSaccade, UnknownName
from saccade.core.method import Method, Mixer, Slot, options

OURS = registry.list_methods()


@pytest.fixture
def others(monkeypatch):
    """Give the registry entry points as an installed distribution would; forget them afterwards."""

    def install(**entries):
        points = [EntryPoint(name, value, "saccade.methods") for name, value in entries.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
        forget()

    def forget():
        registry._places.cache_clear()
        registry.card.cache_clear()

    yield install
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("name", OURS)
def test_file_name_card_and_class_agree(name):
    made, card = registry.get(name), registry.card(name)
    assert issubclass(made, Method | Mixer) and made.card.name == card.name == name
    assert card == made.card, "the card read from the source is the card of the class"
    assert isinstance(card, Card) and made.__module__.split(".")[-1] == name.replace("-", "_")
    assert made.__module__.split(".")[-2] == card.family
    assert registry.get(name.replace("-", "_")) is made
    if issubclass(made, Mixer):
        slot = Slot(16) if card.family == "mixers" else Slot(16, causal=False, grid=(8, 8))
        assert made(slot).slot == slot, "it works with its defaults"
    else:
        assert list(options(made)) == list(options(made())), "it works with its defaults"


def test_every_file_is_listed():
    files = {f.stem.replace("_", "-") for f in registry.METHODS.glob("*/[!_]*.py")}
    assert set(OURS) == files and sorted(OURS) == OURS


def test_patterns_and_families_filter():
    assert registry.list_methods("*kv") == [n for n in OURS if n.endswith("kv")]
    families = {f: registry.list_methods(family=f) for f in ("sparse", "cache", "decode", "probes", "mixers", "nets")}
    assert sorted(n for names in families.values() for n in names) == OURS
    assert "snapkv" in families["cache"] and registry.list_methods("nothing*") == []


def test_an_unknown_name_says_the_nearest():
    said = rf"no method 'snapvk': {len(OURS)} are known\. Did you mean 'snapkv'.*\? See them with: saccade list"
    for ask in (registry.get, registry.card):
        with pytest.raises(UnknownName, match=said):
            ask("snapvk")


def test_listing_and_cards_import_no_torch():
    code = (
        "import sys, saccade\n"
        "from saccade.core import registry\n"
        "[registry.card(n) for n in saccade.list_methods()]\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_answer_is_a_copy():
    registry.list_methods().clear()
    assert registry.list_methods() == OURS


PLUGIN = """
from dataclasses import dataclass
from saccade.core.card import Card
from saccade.core.method import Cache

@dataclass(frozen=True)
class Other(Cache):
    card = Card(name="other", title="x", family="cache", paper="", year=2024, summary="x")

@dataclass(frozen=True)
class Theirs(Cache):
    card = Card(name="theirs", title="Theirs", family="cache", paper="", year=2024, summary="from elsewhere")

class Bare:
    pass
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "saccade_plugin_of_tests.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "saccade_plugin_of_tests"
    sys.modules.pop("saccade_plugin_of_tests", None)


def test_third_parties_add_methods_and_cannot_replace_ours(plugin, others):
    others(theirs=f"{plugin}:Theirs", snapkv=f"{plugin}:Other")
    assert set(registry.list_methods()) == {*OURS, "theirs"}
    assert registry.card("theirs").summary == "from elsewhere"
    assert plugin not in sys.modules, "its card was read without importing it"
    assert registry.get("theirs").__name__ == "Theirs"
    assert registry.get("snapkv").__module__ == "saccade.methods.cache.snapkv"


def test_a_broken_plugin_is_said(plugin, others):
    others(bare=f"{plugin}:Bare", gone="saccade_no_such_module")
    with pytest.raises(BugInSaccade, match=r"the card of 'bare': .* holds no class with `card = Card\(\.\.\.\)`\."):
        registry.card("bare")
    with pytest.raises(BugInSaccade, match=r"the card of 'gone': module saccade_no_such_module has no source\."):
        registry.card("gone")


def test_a_file_whose_card_bears_another_name_is_said(plugin, others):
    others(misnamed=plugin)
    with pytest.raises(BugInSaccade, match=rf"method 'misnamed': {plugin} holds no class whose card bears that name\."):
        registry.get("misnamed")


@pytest.mark.parametrize("name", OURS)
def test_a_card_read_alone_is_that_of_its_class(name):
    found = registry._alone(registry._origin(name))
    assert found and ast.dump(found) == ast.dump(registry._card_call(registry.source(name)[1]))
