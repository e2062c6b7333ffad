"""Files and names that are no model of ours: what can be read is, the rest is refused in words."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import torch

from saccade import models
from saccade.core.errors import BadOption, ModelUnavailable, UnknownName
from saccade.models import loading
from tests.measure import small


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("saved") / "tiny")


def refused(name, pattern: str, kind: type[Exception] = ModelUnavailable) -> str:
    with pytest.raises(kind, match=pattern) as caught:
        models.load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*loading.DTYPES, *loading.DTYPES.values()])
def test_a_folder_loads_in_any_precision_ready_to_use(saved, dtype):
    model, tokenizer = models.load(saved, dtype=dtype)
    wanted = loading.DTYPES.get(dtype, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted} and not model.training
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
    assert all(torch.equal(a, b.to(wanted)) for a, b in zip(model.parameters(), small.model().parameters()))


def test_a_library_prints_nothing(saved, capfd):
    models.load(saved)
    assert capfd.readouterr() == ("", "")


def test_the_callers_bars_are_left_as_they_were(saved):
    for shown in (True, False):
        (loading.bars.enable_progress_bar if shown else loading.bars.disable_progress_bar)()
        models.load(saved)
        assert loading.bars.is_progress_bar_enabled() == shown
    loading.bars.enable_progress_bar()


# --- GGUF files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory):
    """A whole GGUF file with a tensor, of an architecture that nobody has."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "nobody")
    writer.add_block_count(1)
    writer.add_tensor("a", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_readers_bar_is_not_shown(good_gguf, capfd, monkeypatch):
    def read(*args, **kwargs):
        print("a bar", file=sys.stderr)
        raise ValueError("nobody")

    monkeypatch.setattr(loading.convert.AutoModelForCausalLM, "from_pretrained", read)
    refused(good_gguf, "ValueError: nobody")
    assert capfd.readouterr() == ("", "")


def test_a_gguf_of_an_unknown_architecture(good_gguf):
    refused(good_gguf, r"^cannot read model\.gguf: transformers' GGUF reader stopped at .*nobody.*architecture that")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_gguf(good_gguf, tmp_path, share):
    data = good_gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    refused(tmp_path / "cut.gguf", r"^cannot read cut\.gguf: transformers' GGUF reader stopped at .*may be cut short")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\3\4 a zip", b"<html>not found</html>"])
def test_a_foreign_file_called_gguf(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", r"^cannot read x\.gguf: it is no GGUF file\. Give one, or a model's folder\.$")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """transformers, which answers what the test says and remembers what it was asked."""
    asked = []

    def answer(error: Exception) -> list:
        def from_pretrained(name, **kwargs):
            asked.append(name)
            raise error

        monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
        return asked

    return answer


GATED = OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://example.org.\n401.")
AWAY = OSError("We couldn't connect to 'https://example.org' to load the files.\nCheck your internet connection.")


@pytest.mark.parametrize("error, words", [(GATED, "trying to access a gated repo"), (AWAY, "We couldn't connect")])
def test_a_gated_model_or_no_network_is_one_sentence(hub, error, words):
    asked = hub(error)
    known = r"^cannot load 'owner/name': it is none of the known \(smollm2, "
    refused("owner/name", f"{known}.*{words}.*Give a known name")
    assert asked == ["owner/name"]


@pytest.mark.parametrize("name", ["smollm", "SmolLM2", "gemma3", "qwen2.5-coder", "minimind2"])
def test_almost_a_known_name_is_not_looked_for_elsewhere(hub, name):
    asked = hub(AWAY)
    refused(name, f"no model '{name}': 4 are known. Did you mean '.*'", UnknownName)
    assert asked == []


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "facebook/opt-125m"])
def test_other_names_are_transformers_matter(hub, name):
    asked = hub(AWAY)
    refused(name, "We couldn't connect")
    assert asked == [name]


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "no/such/folder", "no.gguf", "~/nothing"])
def test_a_path_to_nothing_is_not_looked_for_on_a_hub(hub, name):
    asked = hub(AWAY)
    refused(name, r"^cannot load '.*': there is no such file or folder\. Known by name: smollm2, ")
    assert asked == []


def test_a_folder_without_a_model(tmp_path):
    refused(tmp_path, r"^cannot load '.*': it is none of the known .*, and transformers says: .*config\.json")


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "int8", torch.int8, None])
def test_an_unknown_precision(saved, dtype):
    with pytest.raises(BadOption, match=r"dtype .*: a model is loaded in one of three\. Say one of: float32, bfloat16"):
        models.load(saved, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here(saved, device):
    with pytest.raises(BadOption, match=rf"device '{device}': torch cannot use it \(.*\)\. Use 'cpu'"):
        models.load(saved, device=device)


def test_an_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; it has KNOWN, Known, is_cached, load"):
        models.lod  # noqa: B018
