"""Landmarks in a pretrained model: grouped softmax is that of the layer, and some steps of training lower the loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach.landmarks import Landmarks, grouped, nearest
from saccade.core.errors import BadArtefact, CannotRun
from saccade.core.method import Slot
from saccade.methods.mixers._places import placed, placed_apart
from saccade.methods.mixers.landmark import Landmark
from tests.methods.handmade import noise, tiny, tokens
from tests.mixers import assert_as_good


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(2, 6), read=st.integers(0, 3))
def test_attention_is_that_of_the_layer(n, size, read):
    layer = Landmark(Slot(16, 2), block_tokens=size, read_blocks=read)
    q, k, v = (noise(1, 2, n, 8, name=name).double() for name in "qkv")
    at = torch.arange(n)
    turned = [placed(x, at, layer.slot) for x in (q, k)]
    inputs = (*turned, v, size)
    ours = nearest(*inputs, read, 8**-0.5, placed_apart) if read else grouped(*inputs, 8**-0.5)
    with torch.no_grad():
        assert_as_good(ours, layer._attend(q, k, v), "attention")


def test_untrained_landmarks_change_nothing_before_the_first_of_them():
    model, ids = tiny(), tokens(20)
    with torch.no_grad():
        found = Landmarks(model, block_tokens=9, rank=2).logits(ids)
        torch.testing.assert_close(found[:, :7], model(ids).logits[:, :7])
        assert found.shape == (1, 19, models.families.VOCAB)
        torch.testing.assert_close(Landmarks(model, block_tokens=9).logits(ids, last=3), found[:, -3:])
        assert not any(module._forward_hooks for module in model.modules())


def test_training_lowers_the_loss_and_an_artefact_brings_it_back():
    model, ids = tiny().float(), tokens(40, rows=2)
    ours, answers = Landmarks(model, block_tokens=6, rank=4), torch.zeros(2, 40, dtype=torch.bool)
    answers[:, -2:] = True
    optimiser = torch.optim.AdamW(ours.weights.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(ours.step(ids, answers))
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again = Landmarks(model, made=ours.artefact("", {}))
    assert again.block_tokens == 6
    assert all(torch.equal(x, ours.weights[name].bfloat16().float()) for name, x in again.weights.items())


def test_what_cannot_be():
    model = tiny()
    made = Landmarks(model, block_tokens=6, rank=4).artefact("", {})
    with pytest.raises(BadArtefact, match="landmarks: they are not of"):
        Landmarks(tiny(layers=3), made=made)
    with pytest.raises(CannotRun, match=r"its attention has no q_proj, k_proj, v_proj, o_proj"):
        Landmarks(models.tiny("phi3"))
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 0] = 0
    with pytest.raises(CannotRun, match="read landmarks in padded rows"), Landmarks(model)._changed(0):
        model(tokens(8), attention_mask=mask, use_cache=False)
