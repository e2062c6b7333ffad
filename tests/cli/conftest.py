"""A tiny model in a folder, and a cache of its own for every test."""

from __future__ import annotations

import pytest

from tests.measure import small


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """For --model."""
    return str(small.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """What is calibrated or claimed stays in the test."""
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
