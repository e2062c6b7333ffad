"""Where things are kept."""

from __future__ import annotations

from pathlib import Path

from saccade.core.paths import SHIPPED, cache_dir


def test_one_variable_moves_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir("a", "b") == tmp_path / "elsewhere" / "a" / "b"
    assert not (tmp_path / "elsewhere").exists(), "asking for a folder does not make it"
    monkeypatch.delenv("SACCADE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "saccade"


def test_shipped_artefacts_come_as_pairs():
    tensors, words = (set(SHIPPED.glob(f"*/*.{kind}")) for kind in ("safetensors", "json"))
    assert tensors and {f.with_suffix(".json") for f in tensors} == words
