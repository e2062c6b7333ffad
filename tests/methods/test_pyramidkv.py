"""PyramidKV's budgets as a plain sequence, their mean, and inside a model: each layer keeps its own share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.budget import Budget
from saccade.core.errors import BadOption
from saccade.core.site import Seen
from saccade.methods.cache.pyramidkv import PyramidKV
from saccade.methods.cache.snapkv import SnapKV
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

BUDGETS = st.sampled_from(["1tok", "9tok", "30tok", 0.1, 0.5, 0.9, 1.0])


def counts(method, n, layers, budget):
    sites = [site(budget, queries=0, keys=n, layer=layer, layers=layers) for layer in range(layers)]
    return [int(method.allocate(torch.zeros(1, 2, n), s.budget, s)[0, 0]) for s in sites]


def sequence(n, layers, held, window, beta):
    """The arithmetic sequence, from its first member down by equal steps; none above the prompt, all with one mean."""
    window = min(window, held)
    mean, last = held - window, (held - window) / beta
    first = 2 * mean - last
    if first > n - window:
        first = n - window
        last = 2 * mean - first
    out = [first]
    for _ in range(layers - 1):
        out.append(out[-1] - (first - last) / (layers - 1))
    return [window + x for x in out]


@given(st.integers(1, 300), st.integers(2, 32), BUDGETS, st.integers(1, 9), st.sampled_from([1.0, 2.0, 20.0]))
@settings(max_examples=60, deadline=None)
def test_layers_keep_an_arithmetic_sequence(n, layers, budget, window, beta):
    held = Budget.of(budget).tokens(n)
    found = counts(PyramidKV(beta=beta, window_tokens=window), n, layers, budget)
    expected = sequence(n, layers, held, window, beta)
    assert all(x - 1 < f <= x + 1e-6 for f, x in zip(found, expected))
    assert found == sorted(found, reverse=True)
    assert layers * held - layers < sum(found) <= layers * held
    assert min(found) >= min(window, held) and max(found) <= n


def test_the_papers_setting():
    """A mean of 64 keys with a window of 8 in 32 layers: in the last 56 / 20 beside it, in the first 112 less that."""
    found = counts(PyramidKV(), 8000, 32, "64tok")
    assert (found[0], found[-1]) == (8 + 109, 8 + 2)
    assert counts(PyramidKV(), 8000, 1, "64tok") == [64]


@given(st.integers(1, 40), BUDGETS)
@settings(max_examples=30, deadline=None)
def test_keys_are_those_that_snapkv_votes_for(n, budget):
    w, here = min(4, n), site(budget, queries=0, keys=n)
    q, k = noise(1, 4, w, 8, name="q"), noise(1, 2, n, 8, name="k")
    seen = Seen(k, k, torch.arange(n).expand(1, 2, n), q)
    ours, theirs = (kind(window_tokens=4).score(seen, here) for kind in (PyramidKV, SnapKV))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("budget", [0.3, "10tok"])
def test_decoding_sees_the_kept_keys_of_each_layer(budget):
    model, ids, n = tiny(layers=3), tokens(50), 40
    with attach(model, PyramidKV(window_tokens=4, pool_tokens=3), budget=budget) as run:
        found = in_pieces(model, ids, [n, n + 1, n + 4])
        kept = [run.record.layer(i).kept[0] for i in range(3)]
    lengths = [len(layer[0]) - 10 for layer in kept]
    assert lengths[0] > lengths[1] > lengths[2] >= 4 and sum(lengths) <= 3 * Budget.of(budget).tokens(n)

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, 50, 50, dtype=torch.bool)
        for head in range(4):
            allowed[:, head, n:, :n] = torch.isin(torch.arange(n), kept[layer][head // 2])
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_options_that_cannot_be_used_say_why():
    with pytest.raises(BadOption, match=r"pyramidkv\.beta=0.5: the last layer would keep most. Give 1 or more"):
        PyramidKV(beta=0.5)
    with pytest.raises(BadOption, match=r"pyramidkv\.window_tokens=0: no query would vote. Give at least 1"):
        PyramidKV(window_tokens=0)
    with pytest.raises(BadOption, match=r"pyramidkv\.pool_tokens=4: an even pooling width has no middle. Give an odd"):
        PyramidKV(pool_tokens=4)
