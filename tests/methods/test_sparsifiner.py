"""Sparsifiner: the low-rank guess by plain loops, how many keys a query has, its two phases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saccade.core.budget import Budget
from saccade.core.errors import BadBudget, BadInput, BadOption, CannotRun
from saccade.core.method import Slot
from saccade.methods.mixers.sparsifiner import Sparsifiner
from saccade.methods.nets import VisionModel
from saccade.ops.attend.reference import masked
from tests.mixers import assert_as_good, made, noise


def layer(budget=1.0, causal=False, grid=None, **options) -> Sparsifiner:
    return made(lambda slot: Sparsifiner(slot, **options), causal=causal, grid=grid, budget=Budget.of(budget))


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(
    n=st.integers(1, 14), causal=st.booleans(), budget=st.sampled_from([0.25, 0.5, "3tok", 1.0]),
    reduce=st.integers(1, 7), coefficients=st.integers(1, 9), scale=st.sampled_from(["heads", "size"]),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_loops(n, causal, budget, reduce, coefficients, scale):
    """Sums up to the query in a causal text, the first places of a longer table, coefficients that stay."""
    options = {"longest_tokens": 16, "reduce": reduce, "coefficients": coefficients, "scale": scale}
    mixer = layer(budget, causal, **options)
    x = noise(1, n, 16).requires_grad_()
    weights, found = noise(*x.shape), []
    for y in (mixer(x)[0], mixer.reference(x)):
        grads = torch.autograd.grad((y * weights).sum(), [x, mixer.qkv.weight, mixer.out.weight])
        found.append(torch.cat([part.flatten() for part in (y, *grads)]))
    assert_as_good(*found, str(n))


@given(n=st.integers(1, 30), causal=st.booleans(), share=st.floats(0.05, 1.0))
def test_every_query_has_as_many_keys_as_the_budget_says(n, causal, share):
    mixer = layer(share, causal, longest_tokens=30)
    keys = mixer.keys(noise(1, 4, n, 4), noise(1, 4, n, 4).flip(2))
    for i, row in enumerate(keys.unbind(2)):
        there = i + 1 if causal else n
        for mine in row[0].tolist():
            seen = [j for j in mine if j >= 0]
            assert len(seen) == len(set(seen)) == Budget(share).tokens(there) and max(seen) < there


def test_with_all_keys_and_while_it_is_fitted_it_is_dense():
    x = noise(2, 12, 16)
    for mixer in (layer(1.0, grid=(3, 4)), layer(0.25, grid=(3, 4), phase="fit")):
        q, k, v = mixer._heads(x)
        wanted = mixer.out(masked(q, k, v, None, scale=0.5)[0].transpose(1, 2).flatten(2))
        assert_as_good(mixer(x)[0], wanted, mixer.phase)


@pytest.mark.parametrize("causal", [True, False])
def test_the_first_phase_teaches_the_predictor_alone_and_it_learns(causal):
    mixer, x = layer(0.25, causal, longest_tokens=12, reduce=2), noise(4, 12, 16)
    names = ("small_q", "small_k", "down", "up")
    optimiser = torch.optim.Adam(mixer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = mixer.fit_loss(x)
        loss.backward()
        learning = {n for n, p in mixer.named_parameters() if p.grad is not None and p.grad.any()}
        assert {n.split(".")[0] for n in learning} == set(names)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_the_second_phase_teaches_everything_else():
    net = VisionModel(3, (1, 8, 8), mixer="sparsifiner", budget=0.25, channels=16, layers=1).double()
    net(noise(2, 1, 8, 8)).logsumexp(-1).sum().backward()
    still = {n.split(".")[3] for n, p in net.named_parameters() if p.grad is None}
    assert still == {"small_q", "small_k", "down", "up"}


def test_what_does_not_fit_is_said():
    with pytest.raises(BadOption, match=r"sparsifiner\.reduce=0: it must be 1 or more"):
        Sparsifiner(Slot(16, 4), reduce=0)
    with pytest.raises(BadOption, match=r"sparsifiner\.longest_tokens=5: the picture has 6 cells"):
        Sparsifiner(Slot(16, 4, causal=False, grid=(2, 3)), longest_tokens=5)
    with pytest.raises(CannotRun, match="sparsifiner in a causal net of pictures: a picture has no order"):
        Sparsifiner(Slot(16, 4, grid=(2, 2)))
    with pytest.raises(BadInput, match="sparsifiner over 9 tokens: it has 8 places"):
        layer(longest_tokens=8)(noise(1, 9, 16))
    with pytest.raises(BadInput, match="sparsifiner over 5 tokens: it has 6 places"):
        layer(grid=(2, 3))(noise(1, 5, 16))
    with pytest.raises(BadBudget, match="the size of one token is not known here"):
        layer("1KiB")(noise(1, 5, 16))
