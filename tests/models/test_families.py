"""Tiny random models of every family: seeded, small, of the shapes asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach.compat import CACHE
from saccade.core.errors import BadOption, UnknownName
from saccade.models.families import FAMILIES, VOCAB

families = st.sampled_from(FAMILIES)
seeds = st.integers(0, 2**31)
WINDOWED = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3")
few = settings(max_examples=20)


def weights(model) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def ids(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


def test_the_nine_families():
    wanted = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "gpt-neox"}
    assert set(FAMILIES) == wanted


@few
@given(families, seeds)
def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(family, seed):
    one = models.tiny(family, seed=seed)
    torch.rand(7)
    two = models.tiny(family.replace("-", "_"), seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two)))
    other = models.tiny(family, seed=seed + 1)
    assert all(not torch.equal(a, b) for a, b in zip(weights(one), weights(other)))


@few
@given(families, seeds)
def test_the_callers_random_numbers_go_on_as_if_nothing_happened(family, seed):
    torch.manual_seed(seed)
    wanted = torch.rand(5)
    torch.manual_seed(seed)
    models.tiny(family)
    assert torch.equal(torch.rand(5), wanted)


@few
@given(families, st.integers(1, 4), st.sampled_from([(2, 1), (4, 2), (4, 4), (6, 2)]), st.sampled_from([8, 16, 32]))
def test_shapes_are_those_asked_for(family, layers, heads, head_size):
    kv = heads[0] if family == "gpt-neox" else heads[1]
    model = models.tiny(family, layers=layers, heads=heads[0], kv_heads=kv, head_size=head_size)
    config = model.config
    assert config.num_hidden_layers == layers and config.num_attention_heads == heads[0]
    cache = model(ids(5), use_cache=True)[CACHE]
    assert len(cache.layers) == layers
    assert all(layer.keys.shape == (1, kv, 5, head_size) for layer in cache.layers)
    assert logits(model, ids(5)).shape == (1, 5, VOCAB)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_ready_and_say_something(family):
    model = models.tiny(family)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    out = logits(model, ids(20))
    assert out.isfinite().all() and out.std() > 0.1
    longer = logits(model, torch.cat([ids(20), ids(4, seed=1)], 1))
    assert torch.allclose(out, longer[:, :20], atol=out.abs().max().item() * 1e-5), "it looks ahead"


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_far_from_uniform(family):
    model = models.tiny(family)
    model.set_attn_implementation("eager")
    maps = model(ids(32), output_attentions=True).attentions
    assert len(maps) == 2
    assert all(layer[0, :, -1].max(-1).values.mean() > 3 / 32 for layer in maps)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_hides_what_lies_before_it(family):
    """The first token: with one layer that slides, the last one cannot see it; without a window it can."""

    def changed(window: int | None) -> bool:
        model = models.tiny(family, layers=1, window=window)
        one, two = ids(12), ids(12)
        two[0, 0] = 3 + (two[0, 0] - 2) % (VOCAB - 3)
        return not torch.equal(logits(model, one)[:, -1], logits(model, two)[:, -1])

    assert changed(None) and not changed(4)


@pytest.mark.parametrize("family", sorted(set(WINDOWED) - {"mistral", "phi3"}))
def test_layers_slide_in_turn(family):
    kinds = models.tiny(family, layers=4, window=8).config.layer_types
    assert kinds == ["sliding_attention", "full_attention"] * 2


def test_smollm3_has_a_layer_without_rotation():
    assert list(models.tiny("smollm3").config.no_rope_layers) == [1, 0]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WINDOWED)))
def test_a_window_where_there_is_none(family):
    words = rf"{family} with a window: it has no sliding-window layers\. These have: gemma2"
    with pytest.raises(BadOption, match=words):
        models.tiny(family, window=8)


def test_heads_that_do_not_divide():
    with pytest.raises(BadOption, match="4 heads over 3 KV heads: the second must divide the first"):
        models.tiny("llama", heads=4, kv_heads=3)
    with pytest.raises(BadOption, match="gpt-neox with 2 KV heads: it has one per query head"):
        models.tiny("gpt-neox", kv_heads=2)


def test_an_unknown_family():
    with pytest.raises(UnknownName, match=r"no model family 'lama': 9 are known\. Did you mean 'llama'"):
        models.tiny("lama")
