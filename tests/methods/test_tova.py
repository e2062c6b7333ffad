"""TOVA as a loop over tokens, its budget, and inside a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.budget import Budget
from saccade.core.site import Seen
from saccade.methods.cache.tova import TOVA
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask
from tests.methods.weighing import kept_by, watched

MODEL, N = tiny(), 30


@given(st.integers(1, 40))
@settings(deadline=None)
def test_the_score_is_the_mean_weight_of_the_last_query(n):
    q, k = noise(2, 4, 1, 8, name="q").double(), noise(2, 2, n, 8, name="k").double()
    found = TOVA().score(Seen(k, k, torch.arange(n).expand(2, 2, n), q), site(1.0, queries=0, keys=n))
    for row in range(2):
        heads = [(q[row, h, 0] @ k[row, h // 2].T * 8**-0.5).softmax(-1) for h in range(4)]
        mean = torch.stack([sum(float(h[j]) for h in heads) / torch.tensor(4.0).double() for j in range(n)])
        torch.testing.assert_close(found[row], mean.expand(2, n))


def forgetful(weights, held, prompt, total):
    """Algorithm of the paper for the tokens after a prompt: weights(t, kept) [h kept] -> kept before each of them."""
    kept = list(range(prompt))
    before = []
    for t in range(prompt - 1, total):
        kept = kept if t < prompt else [*kept, t]
        if t >= prompt:
            before.append(kept[:-1])
        mean = weights(t, kept).mean(0)
        while len(kept) > held:
            worst = int(mean.argmin())
            kept, mean = kept[:worst] + kept[worst + 1 :], torch.cat([mean[:worst], mean[worst + 1 :]])
    return before, kept


@pytest.mark.parametrize("held", [1, 5, 12, 40])
@pytest.mark.parametrize("prompt", [1, 20])
def test_the_key_with_the_lowest_weight_goes_after_every_token(held, prompt):
    """Layer 0, whose queries and keys do not depend on what any layer forgets."""
    ids = tokens(N)
    q, k, before = watched(MODEL, TOVA(), f"{held}tok", ids, prompt)

    def weights(t, kept):
        keys = k[0, :, kept].repeat_interleave(2, 0)
        return (keys @ q[0, :, t, :, None])[..., 0].mul(q.shape[-1] ** -0.5).softmax(-1)

    expected, last = forgetful(weights, held, prompt, N)
    assert [[head.tolist() for head in step] for step in before[:-1]] == [[step, step] for step in expected]
    assert before[-1][0].tolist() == last


@given(st.floats(0.05, 1.0), st.integers(1, N - 2))
@settings(max_examples=6, deadline=None)
def test_a_fraction_is_never_exceeded_and_keeps_at_least_one_key(share, n):
    _, _, held = watched(MODEL, TOVA(), share, tokens(N), n)
    for seen, heads in enumerate(held, n):
        assert all(1 <= len(head) <= Budget.of(share).tokens(seen) for head in heads)


def test_decoding_sees_what_was_held_before_each_token():
    ids, n = tokens(N), 20
    masks = [kept_by(MODEL, TOVA(), "8tok", ids, n, layer) for layer in range(2)]
    with attach(MODEL, TOVA(), budget="8tok"):
        found = in_pieces(MODEL, ids, [n])
    torch.testing.assert_close(found, under_mask(MODEL, ids, lambda layer, q, k: masks[layer]))
