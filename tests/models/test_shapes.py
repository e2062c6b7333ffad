"""Sizes of models without the models: the library's own agree with their parameters, configs are read or refused."""

from __future__ import annotations

import json

import pytest

from saccade import models
from saccade.core.errors import BadInput, UnknownName
from saccade.models.shapes import SHAPES, of_config, shape

# the file of this one holds its output head a second time, which is counted
TWICE = {"qwen2.5-coder-1.5b": 151936 * 1536}


@pytest.mark.parametrize("name", models.KNOWN)
def test_a_known_model_has_the_parameters_of_its_shape_but_for_norms_and_biases(name):
    known = models.KNOWN[name].parameters - TWICE.get(name, 0)
    assert 0 <= known - shape(name).parameters < known / 1000


def test_names_are_read_as_people_write_them():
    assert shape("Llama-3-8B") == shape("llama3-8b") == SHAPES["llama-3-8b"]
    assert round(shape("llama-3-8b").parameters / 1e9, 2) == 8.03 and round(shape("llama-3-70b").parameters / 1e9) == 71
    with pytest.raises(UnknownName, match=r"no model shape 'lama-3-8b': .* Did you mean 'llama-3-8b'"):
        shape("lama-3-8b")


@pytest.mark.parametrize("family, window, windowed", [("llama", None, 0), ("gemma3", 8, 1), ("mistral", 8, 2)])
def test_a_config_is_read_from_its_file_or_its_folder(tmp_path, family, window, windowed):
    model = models.tiny(family, window=window)
    model.config.save_pretrained(tmp_path)
    found = shape(tmp_path)
    assert found == shape(tmp_path / "config.json") and found.name == tmp_path.name
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert (found.windowed, found.window_tokens) == (windowed, window or 0)


def test_what_is_no_dense_decoder_is_refused(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    with pytest.raises(BadInput, match="its config has no vocab_size"):
        of_config(sizes, "x")
    with pytest.raises(BadInput, match="it mixes experts, which are not reckoned"):
        of_config(sizes | {"vocab_size": 8, "num_local_experts": 4}, "x")
    for text, found in (("{", "it is no JSON that can be read"), ("[]", "it is no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match=found):
            shape(tmp_path)
    whole = of_config(sizes | {"vocab_size": 8}, "x")
    assert whole.kv_heads == whole.heads == 2 and whole.head_size == 4
    assert json.loads(json.dumps(whole.__dict__))["tied"] is False
