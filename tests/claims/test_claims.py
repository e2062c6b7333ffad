"""Every method has a claim, its smoke tier runs on a tiny model, and what the claims say is complete."""

from __future__ import annotations

import importlib

import pytest

from saccade.claims import _found
from saccade.claims.run import claim
from saccade.core import registry

METHODS = registry.list_methods()


@pytest.fixture(autouse=True)
def kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(_found, "SHIPPED", tmp_path / "found")
    monkeypatch.setattr(_found, "CHECKOUT", tmp_path)
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", METHODS)
def test_the_smoke_tier_holds_beside_full_and_random(name):
    (line,) = claim([name], "smoke")
    assert line["verdict"] == "reproduced", [check for check in line["checks"] if not check["holds"]]
    assert {"full", "random"} <= {row["who"] for row in line["table"]}
    assert _found.latest(name) == line


@pytest.mark.slow
def test_the_cpu_tier_measures_the_real_model():
    (line,) = claim(["full"], "cpu")
    assert line["verdict"] == "reproduced" and "SmolLM2" in line["setting"]


@pytest.mark.parametrize("name", METHODS)
def test_the_paper_is_named(name):
    said = importlib.import_module(f"saccade.claims.{name.replace('-', '_')}").CLAIM
    number = registry.card(name).paper.removeprefix("arXiv:")
    assert number in said.where
    assert all(text.strip() == text and "  " not in text for text in (said.says, said.where, said.how, said.counts))
