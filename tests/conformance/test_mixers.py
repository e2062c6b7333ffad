"""Layers that are trained: their forms agree, gradients too, and a row depends on nothing but itself and its past."""

from __future__ import annotations

import pytest
import torch

from saccade.core.budget import Budget
from saccade.core.method import Mixer
from saccade.core.registry import card, get, list_methods
from tests.conformance.cases import Case
from tests.mixers import Fading, assert_as_good, made, noise

N, CUT = 9, 4
BUDGET = Budget.of("4tok")


def built(layer: Case, dtype: torch.dtype = torch.float64, **slot):
    """It, with a budget in tokens, which holds for rows of every length."""
    return made(layer.name, dtype, budget=BUDGET, **slot)


@pytest.mark.claims("forms")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_11_forward_is_the_reference_and_its_gradients(layer, causal):
    mixer, x = built(layer, causal=causal), noise(2, N, 16).requires_grad_()
    weights = noise(2, N, 16)
    seen = []
    for y in (mixer(x)[0], mixer.reference(x)):
        wanted = [x, *mixer.parameters()]
        # what only chooses has no gradient, in both
        grads = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True, materialize_grads=True)
        seen.append([y, *grads])
    for ours, theirs in zip(*seen):
        assert_as_good(ours, theirs, str(layer))


@pytest.mark.claims("chunks")
def test_06_steps_and_pieces_are_one_pass(layer):
    mixer, x = built(layer), noise(2, N, 16)
    whole, end = mixer(x)
    first, state = mixer(x[:, :CUT])
    second, state = mixer(x[:, CUT : N - 1], state)
    last, state = mixer.step(x[:, N - 1], state)
    assert_as_good(torch.cat([first, second, last[:, None]], 1), whole, str(layer))
    assert state.keys() == end.keys() and all(len(tensor) == 2 for tensor in state.values())
    steps, state = [], {}
    for t in range(CUT):
        y, state = mixer.step(x[:, t], state)
        steps.append(y)
    assert_as_good(torch.stack(steps, 1), first, str(layer))


@pytest.mark.claims("padding")
def test_04_padding_behind_a_row_changes_nothing(layer):
    """Not its outputs, not what follows, whatever lies there."""
    mixer, x, lengths = built(layer), noise(3, N, 16), torch.tensor([N, 3, 5])
    rubbish = x.clone()
    for row, n in enumerate(lengths.tolist()):
        rubbish[row, n:] = torch.nan
    after = noise(3, 1, 16)[:, 0]
    together, state = mixer(rubbish, lengths=lengths)
    then, _ = mixer.step(after, state)
    for row, n in enumerate(lengths.tolist()):
        alone, state = mixer(x[row : row + 1, :n])
        assert_as_good(together[row : row + 1, :n], alone, str(layer))
        assert_as_good(then[row : row + 1], mixer.step(after[row : row + 1], state)[0], str(layer))


@pytest.mark.claims("cache-ops")
def test_08_rows_of_a_state_can_be_chosen(layer):
    mixer, x, after, order = built(layer), noise(3, N, 16), noise(2, 16), torch.tensor([2, 0])
    _, state = mixer(x)
    _, chosen = mixer(x[order])
    ours, _ = mixer.step(after, {name: tensor[order] for name, tensor in state.items()})
    assert_as_good(ours, mixer.step(after, chosen)[0], str(layer))


@pytest.mark.claims("causality")
def test_10_no_token_sees_a_later_one(layer):
    mixer, x = built(layer), noise(2, N, 16)
    other = torch.cat([x[:, :CUT], -x[:, CUT:]], 1)
    assert_as_good(mixer(other)[0][:, :CUT], mixer(x)[0][:, :CUT], str(layer))


@pytest.mark.claims("memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_12_the_dtype_is_kept_and_strides_do_not_matter(layer, dtype):
    mixer, x = built(layer, dtype), noise(2, 16, N, dtype=dtype)
    y, _ = mixer(x.mT)
    assert y.dtype == dtype and torch.equal(y, mixer(x.mT.contiguous())[0])


def test_11_a_layer_writes_its_forms_and_a_card_of_its_family():
    for kind in [Fading, *[get(n) for n in list_methods(family="mixers")]]:
        assert issubclass(kind, Mixer) and kind.card.family == "mixers"
        assert {"forward", "reference"} <= set(vars(kind)), f"{kind.__name__} inherits a form unwritten"
    strange = [n for n in list_methods() if issubclass(get(n), Mixer) and card(n).family not in ("mixers", "nets")]
    assert not strange
