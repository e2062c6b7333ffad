"""Every method gives on a CUDA device what it gives on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from saccade.attach import attach
from saccade.core.budget import Budget
from tests.conformance.cases import equipped, tiny
from tests.helpers import TIMES, error, rounding
from tests.methods.handmade import in_pieces, tokens
from tests.mixers import assert_as_good, made, noise


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_logits_on_a_gpu_are_those_of_the_cpu(plain, budget):
    """In float64, so that no rounding turns a choice over."""
    if budget not in (1.0, *plain.budgets):
        pytest.skip(f"{plain} takes no such budget")
    model, ids = tiny(4, 2, 16), tokens(96)
    method = equipped(plain.method(), model)
    found = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        with attach(there, method, budget=budget):
            found.append(in_pieces(there, ids.to(device), [80]).cpu())
    own = [in_pieces(copy.deepcopy(model).to(device), ids.to(device), [80]).cpu() for device in ("cpu", "cuda")]
    assert error(*found) <= TIMES * max(error(*own), rounding(own[0], torch.float64))


@pytest.mark.gpu
def test_it_generates_there(plain):
    model = copy.deepcopy(tiny(4, 2, 16)).cuda()
    ids = tokens(64, 3).cuda()
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    budget = 0.5 if 0.5 in plain.budgets else 1.0
    with attach(model, equipped(plain.method(), model), budget=budget):
        words = model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, num_beams=2)
    assert words.shape == (3, 70) and words.is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_a_layer_on_a_gpu_is_that_on_the_cpu(layer, causal):
    """Its outputs, gradients and a step; in float64, so that no rounding turns a choice over."""
    found = []
    for device in ("cpu", "cuda"):
        mixer = made(layer.name, causal=causal, budget=Budget.of("4tok")).to(device)
        x, after = noise(2, 36, 16).to(device).requires_grad_(), noise(2, 16).to(device)
        y, state = mixer(x)
        wanted = [x, *mixer.parameters()]
        grads = torch.autograd.grad((y * noise(2, 36, 16).to(device)).sum(), wanted, allow_unused=True)
        found.append([y, *grads, *([mixer.step(after, state)[0]] if causal else [])])
    for ours, theirs in zip(*reversed(found)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_as_good(ours.cpu(), theirs, str(layer))
