"""H2O's algorithm as a loop over tokens, its sums in pieces, its budget, and inside a model."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.budget import Budget
from saccade.core.errors import BadOption
from saccade.core.site import Seen
from saccade.methods.cache.h2o import H2O
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask
from tests.methods.weighing import kept_by, watched

MODEL, N = tiny(), 30


@given(st.integers(1, 40), st.lists(st.integers(1, 39), max_size=3, unique=True))
@settings(max_examples=25, deadline=None)
def test_sums_over_all_queries_however_they_are_cut(n, cuts):
    q, k = noise(2, 3, n, 8, name="q").double(), noise(2, n, 8, name="k").double()
    cuts = [0, *sorted(c for c in cuts if c < n), n]
    found = torch.zeros(2, n).double()
    for a, z in itertools.pairwise(cuts):
        found[:, :z] += H2O().tally(q[:, :, a:z], k[:, :z], site(1.0, queries=z - a, keys=z))
    expected = torch.zeros(2, n).double()
    for row in range(2):
        for head in range(3):
            for i in range(n):
                expected[row, : i + 1] += (q[row, head, i] @ k[row, : i + 1].T * 8**-0.5).softmax(-1)
    torch.testing.assert_close(found, expected)


@given(st.integers(1, 40), st.sampled_from(["1tok", "7tok", 0.3, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_heavy_hitters_and_recent_keys(n, budget, share):
    here, sums = site(budget, queries=0, keys=n), noise(1, 2, n, name="sums").abs()
    scores = H2O(heavy_share=share).score(Seen(sums, sums, torch.arange(n).expand(1, 2, n), tally=sums), here)
    held = Budget.of(budget).tokens(n)
    heavy = min(int(held * share), held - 1)
    for head in range(2):
        best = sorted(range(n - (held - heavy)), key=lambda j: -float(sums[0, head, j]))[:heavy]
        expected = sorted([*best, *range(n - (held - heavy), n)])
        assert scores[0, head].argsort(descending=True, stable=True)[:held].sort().values.tolist() == expected


def algorithm(weights, held, heavy, prompt, total):
    """Algorithm 1 for one key/value head after a prompt: weights(t, kept) [s kept] -> kept before each token."""
    sums = {j: 0.0 for j in range(total)}
    for t in range(prompt):
        for j, w in zip(range(t + 1), weights(t, list(range(t + 1))).sum(0).tolist()):
            sums[j] += w
    kept, before = list(range(prompt)), []
    for t in range(prompt - 1, total):
        if t >= prompt:
            before.append(kept)
            kept = [*kept, t]
            for j, w in zip(kept, weights(t, kept).sum(0).tolist()):
                sums[j] += w
        if len(kept) > held:
            recent = kept[len(kept) - (held - heavy) :]
            older = sorted(kept[: len(kept) - (held - heavy)], key=lambda j: -sums[j])
            kept = sorted([*older[:heavy], *recent])
    return before, kept


@pytest.mark.parametrize("held", [1, 5, 12, 40])
@pytest.mark.parametrize("prompt", [1, 20])
def test_the_lightest_key_outside_the_window_goes_after_every_token(held, prompt):
    """Layer 0, whose queries and keys do not depend on what any layer forgets."""
    ids = tokens(N)
    q, k, before = watched(MODEL, H2O(), f"{held}tok", ids, prompt)
    for head in range(2):

        def weights(t, kept, head=head):
            logits = q[0, 2 * head : 2 * head + 2, t] @ k[0, head, kept].T
            return logits.mul(q.shape[-1] ** -0.5).softmax(-1)

        expected, last = algorithm(weights, held, held // 2, prompt, N)
        assert [step[head].tolist() for step in before] == [*expected, last]


@given(st.floats(0.05, 1.0), st.integers(1, N - 2))
@settings(max_examples=6, deadline=None)
def test_a_fraction_is_never_exceeded_and_keeps_at_least_one_key(share, n):
    _, _, held = watched(MODEL, H2O(), share, tokens(N), n)
    for seen, heads in enumerate(held, n):
        assert all(1 <= len(head) <= Budget.of(share).tokens(seen) for head in heads)


def test_decoding_sees_what_was_held_before_each_token():
    ids, n = tokens(N), 20
    masks = [kept_by(MODEL, H2O(), "8tok", ids, n, layer) for layer in range(2)]
    with attach(MODEL, H2O(), budget="8tok"):
        found = in_pieces(MODEL, ids, [n])
    torch.testing.assert_close(found, under_mask(MODEL, ids, lambda layer, q, k: masks[layer]))


def test_a_share_that_is_none_is_refused():
    with pytest.raises(BadOption, match=r"h2o\.heavy_share=1.5: it takes a share from 0 to 1. Give a half"):
        H2O(heavy_share=1.5)
