"""What was saved is found again, for the same model only; what is broken is said."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from saccade.core import artefact, rng
from saccade.core.artefact import Artefact, Draft
from saccade.core.errors import BadArtefact, CannotRun


def made(**more) -> Artefact:
    words = {"method": "made", "model": "tiny", "fingerprint": "f1", "tensors": {"x": torch.arange(6.0).view(2, 3)}}
    return Artefact(**{**words, **more})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artefact, "SHIPPED", tmp_path / "shipped")
    return tmp_path


@given(array_shapes(max_dims=3, max_side=4), st.text(max_size=5), st.integers(0, 2**62))
def test_what_is_saved_is_loaded(tmp_path_factory, shape, data, seed):
    file = tmp_path_factory.mktemp("a") / "one"
    x, y = (torch.randn(shape, generator=rng.generator(name, seed)) for name in "xy")
    one = made(tensors={"x": x, "turned": y.movedim(0, -1)}, data=data, seed=seed)
    again = Artefact.load(one.save(file))
    for name, tensor in one.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    assert dataclasses.replace(again, tensors={}) == dataclasses.replace(one, tensors={})
    assert file.with_suffix(".json").exists() and file.with_suffix(".safetensors").exists()


def test_it_is_found_by_the_models_fingerprint_the_users_own_first(cache):
    made(data="shipped").save(cache / "shipped/made/tiny")
    made(fingerprint="f2", data="another model").save(cache / "shipped/made/another")
    assert Artefact.find("made", "f1").data == "shipped"
    made(data="own").save(cache / "cache/artefacts/made/tiny")
    assert Artefact.find("made", "f1").data == "own"
    assert Artefact.find("made", "f2").data == "another model"
    assert Artefact.find("made", "f3") is Artefact.find("unheard-of", "f1") is None


@pytest.mark.parametrize("harm", ["missing", "no tensors", "truncated", "foreign tensors", "foreign words", "no json"])
def test_a_broken_file_is_said(tmp_path, harm):
    file = made().save(tmp_path / "one")
    words = file.with_suffix(".json")
    if harm == "missing":
        words.unlink()
    elif harm == "no tensors":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif harm == "foreign tensors":
        file.write_bytes(b"GGUF" * 20)
    elif harm == "foreign words":
        words.write_text(json.dumps({"method": "made", "something": "else"}))
    else:
        words.write_text('{"method": ')
    said = rf"artefact {re.escape(str(file))}: it cannot be read \(.+\)\. Make it again: saccade calibrate"
    with pytest.raises(BadArtefact, match=said):
        Artefact.load(file)


def test_a_broken_file_in_the_cache_is_not_passed_over(cache):
    file = made().save(cache / "cache/artefacts/made/tiny").with_suffix(".json")
    file.write_text("{")
    with pytest.raises(BadArtefact, match=rf"artefact {re.escape(str(file))}: it cannot be read \(.+\)\. Delete it\."):
        Artefact.find("made", "f1")


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("no folder")
    file = re.escape(str(tmp_path / "file/one.safetensors"))
    said = rf"save the artefact {file}: it cannot be written \(.+\)\. Make room, or move the cache with SACCADE_CACHE\."
    with pytest.raises(CannotRun, match=said):
        made().save(tmp_path / "file/one")


def test_a_disk_that_fills_up_leaves_the_older_artefact_whole(tmp_path, monkeypatch):
    file = made(data="older").save(tmp_path / "one")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CannotRun, match=os.strerror(errno.ENOSPC)):
        made(data="newer").save(file)
    assert Artefact.load(file).data == "older"


def test_reading_makes_no_folder(cache):
    assert Artefact.find("made", "f1") is None
    assert not (cache / "cache").exists()


def test_a_draft_keeps_what_was_made_until_it_is_cleared(tmp_path):
    draft, made_times = Draft(tmp_path / "mine"), []

    def make():
        made_times.append(1)
        return {"x": torch.arange(3)}

    assert draft.load("a") is None
    assert [draft.kept("a", make)["x"].tolist() for _ in range(2)] == [[0, 1, 2]] * 2 and len(made_times) == 1
    draft.clear()
    assert draft.load("a") is None and not (tmp_path / "mine").exists()
    nowhere = Draft()
    for _ in range(2):
        nowhere.kept("a", make)
    assert len(made_times) == 3 and nowhere.load("a") is None


def test_a_broken_draft_is_said(tmp_path):
    Draft(tmp_path).save("a", {"x": torch.arange(3)})
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(BadArtefact, match=r"draft .*a\.safetensors: it cannot be read \(.+\)\. Delete its folder\."):
        Draft(tmp_path).load("a")
