"""The norm rule, and budgets that pay for dense layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.budget import Budget
from saccade.core.errors import BadBudget, CannotRun
from saccade.core.site import Seen
from saccade.methods.cache.knorm import KNorm
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask


@given(st.integers(1, 40), st.floats(0.05, 1.0))
def test_what_stays_has_lower_norm_than_what_goes(n, share):
    keys, here = noise(2, 2, n, 8), site(share, queries=0, keys=n)
    scores = KNorm().score(Seen(keys, keys, torch.arange(n).expand(2, 2, n)), here)
    count = int(KNorm().allocate(scores, here.budget, here)[0, 0])
    assert 1 <= count <= Budget.of(share).tokens(n)
    order = scores.argsort(-1, descending=True)
    norms = keys.norm(dim=-1).gather(-1, order)
    if count < n:
        assert (norms[..., :count].amax(-1) <= norms[..., count:].amin(-1)).all()


@given(st.integers(1, 300), st.integers(1, 32), st.integers(0, 8), st.floats(0.05, 1.0))
def test_dense_layers_are_inside_the_budget(n, layers, dense, share):
    budget = Budget.of(share)
    assume(dense < layers and not budget.unpaid(layers, dense))
    held = [budget.layer_tokens(n, layer, layers, dense) for layer in range(layers)]
    assert min(held) >= 1 and sum(held) <= layers * budget.tokens(n)
    if share == 1.0 or (budget.tokens(n) * layers - n * dense) >= layers - dense:
        assert held[:dense] == [n] * dense


def test_decoding_sees_the_kept_keys_and_nothing_else():
    model, ids, n = tiny(layers=3), tokens(30), 24
    with attach(model, KNorm(dense_layers=1), budget=0.5) as run:
        found = in_pieces(model, ids, [n, n + 1])
        kept = [run.record.layer(i).kept[0] for i in range(3)]
    assert [len(layer[0]) - 6 for layer in kept] == [24, 6, 6]

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, 30, 30, dtype=torch.bool)
        for head in range(4):
            allowed[:, head, n:, :n] = torch.isin(torch.arange(n), kept[layer][head // 2])
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_dense_layers_that_cannot_be_paid_are_refused():
    with pytest.raises(CannotRun, match=r"dense_layers=2 of 2 layers alone exceed budget=0.5; change one of the two"):
        attach(tiny(), KNorm(dense_layers=2), budget=0.5)
    with pytest.raises(BadBudget, match=r"100 tokens in 2 of 4 layers leave less than one token for each"):
        Budget.of("40tok").layer_tokens(100, 3, 4, 2)
