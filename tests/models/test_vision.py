"""The tiny LLaVA: seeded, small, with eyes that matter, around any Llama."""

from __future__ import annotations

import torch

from saccade import models
from saccade.attach import attach, explain
from saccade.core import rng


def asked(model, seed=0):
    """Words around an image, and the image."""
    ids = torch.randint(3, 100, (1, 44), generator=rng.generator("words"))
    ids[:, 3:39] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 48, 48, generator=rng.generator("image", seed))}


@torch.no_grad()
def logits(model, seed=0):
    return model(**asked(model, seed)).logits


def test_the_same_seed_gives_the_same_model_whatever_was_drawn_before():
    one, state = models.tiny_llava(), torch.get_rng_state()
    torch.rand(7)
    two, other = models.tiny_llava(), models.tiny_llava(seed=1)
    assert torch.equal(logits(one), logits(two)) and not torch.equal(logits(one), logits(other))
    torch.set_rng_state(state)
    wanted = torch.rand(5)
    torch.set_rng_state(state)
    models.tiny_llava()
    assert torch.equal(torch.rand(5), wanted)


def test_it_is_ready_and_what_it_sees_is_seen():
    model = models.tiny_llava()
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    one, other = logits(model), logits(model, 1)
    assert one.shape == (1, 44, models.families.VOCAB) and one.isfinite().all()
    assert torch.equal(one[:, :3], other[:, :3]) and (one[:, 39:] - other[:, 39:]).abs().max() > 0.1


def test_the_language_part_is_the_one_that_was_given():
    language = models.tiny("llama", layers=3, heads=2, head_size=8)
    model = models.tiny_llava(language, image_token=5, image_pixels=24)
    assert model.model.language_model is language.model and model.lm_head is language.lm_head
    assert model.config.image_token_id == 5 and model.config.text_config is language.config
    ids = torch.randint(6, 100, (1, 12), generator=rng.generator("words"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, language(ids).logits)


def test_methods_are_attached_to_its_language_part():
    """All of its layers, in a prompt with an image, and the model is afterwards what it was."""
    model = models.tiny_llava()
    before, implementations = logits(model), computed_by(model)
    assert explain(model, "snapkv", budget=0.5) == []
    with attach(model, "snapkv", budget=0.5) as run:
        model.generate(**asked(model), max_new_tokens=3, do_sample=False)
        assert run.record.kept_fraction < 0.6 and len(run.record.layers) == 2
    assert torch.equal(logits(model), before)
    assert computed_by(model) == implementations


def computed_by(model):
    """Which attention each part has."""
    return [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")]
