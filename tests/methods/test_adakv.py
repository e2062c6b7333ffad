"""Ada-KV's allocation written out, its budget, and inside a model: uneven heads, stored without padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.budget import Budget
from saccade.core.errors import BadOption
from saccade.core.site import Seen
from saccade.methods.cache.adakv import AdaKV
from saccade.methods.cache.snapkv import SnapKV
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

BUDGETS = st.sampled_from(["1tok", "3tok", "12tok", 0.1, 0.5, 0.9, 1.0])


def written_out(scores, held, safeguard):
    """Algorithms 1 and 2: all votes of all heads in one list, the best B g of it counted by head, mixed with B."""
    out = []
    for row in scores.tolist():
        everything = sorted(((s, head) for head, line in enumerate(row) for s in line), key=lambda x: -x[0])
        won = [0] * len(row)
        for _, head in everything[: len(row) * held]:
            won[head] += 1
        out.append([math.floor((1 - safeguard) * t + safeguard * held + 1e-9) for t in won])
    return torch.tensor(out)


@given(st.integers(1, 40), BUDGETS, st.sampled_from([0.0, 0.2, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_best_of_all_heads_and_an_even_share(n, budget, safeguard):
    scores, here = noise(3, 2, n, name="votes"), site(budget, queries=0, keys=n)  # no two are equal
    found = AdaKV(safeguard=safeguard).allocate(scores, here.budget, here)
    assert torch.equal(found, written_out(scores, here.budget.tokens(n), safeguard))


@given(st.integers(1, 60), BUDGETS, st.integers(1, 9), st.sampled_from([1, 7]))
@settings(max_examples=40, deadline=None)
def test_a_layer_stays_in_its_budget_and_the_window_stays(n, budget, window, pool):
    w, method = min(window, n), AdaKV(window_tokens=window, pool_tokens=pool)
    q, k, here = noise(2, 4, w, 8, name="q"), noise(2, 2, n, 8, name="k"), site(budget, queries=0, keys=n)
    scores = method.score(Seen(k, k, torch.arange(n).expand(2, 2, n), q), here)
    counts, held = method.allocate(scores, here.budget, here), Budget.of(budget).tokens(n)
    assert (counts >= min(w, held)).all() and (counts <= n).all()
    assert ((counts.sum(-1) <= 2 * held) & (counts.sum(-1) > 2 * held - 2)).all()


def test_equal_votes_go_to_the_heads_in_turn():
    here = site("6tok", queries=0, keys=20)
    assert AdaKV(safeguard=0.0).allocate(torch.ones(1, 2, 20), here.budget, here).tolist() == [[6, 6]]


@given(st.integers(10, 60), st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=20, deadline=None)
def test_more_votes_are_kept_than_by_even_shares(n, budget):
    """Theorem: without a safeguard no other split of the budget keeps more of them."""
    q, k, here = noise(1, 4, 4, 8, name="q"), noise(1, 2, n, 8, name="k"), site(budget, queries=0, keys=n)
    method = AdaKV(safeguard=0.0, window_tokens=4, pool_tokens=1)
    scores = method.score(Seen(k, k, torch.arange(n).expand(1, 2, n), q), here)
    votes = scores.masked_fill(scores.isinf(), 0)[0].sort(-1, descending=True).values.cumsum(-1)
    held = here.budget.tokens(n)
    mine = method.allocate(scores, here.budget, here)[0] - min(4, held)
    kept = [
        sum(float(head[c - 1]) for head, c in zip(votes, counts) if c)
        for counts in (mine.tolist(), [max(0, held - 4)] * 2)
    ]
    assert kept[0] >= kept[1] or math.isclose(*kept)


def test_all_safeguard_is_snapkv():
    model, ids = tiny(), tokens(60)
    shape = {"window_tokens": 8, "pool_tokens": 3}
    kept = []
    for method in (AdaKV(safeguard=1.0, **shape), SnapKV(**shape)):
        with attach(model, method, budget=0.4) as run:
            in_pieces(model, ids, [59])
            kept.append([head.tolist() for i in range(2) for head in run.record.layer(i).kept[0]])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("budget", [0.3, "12tok"])
def test_uneven_heads_are_stored_without_padding_and_decoding_sees_them(budget):
    model, ids, n = tiny(), tokens(50), 40
    with attach(model, AdaKV(window_tokens=4, pool_tokens=3), budget=budget) as run:
        with torch.no_grad():
            model(ids[:, :n], use_cache=True)
        after_prompt, held = run.record.bytes_held, [len(h) for i in range(2) for h in run.record.layer(i).kept[0]]
        found = in_pieces(model, ids, [n, n + 1, n + 4])
        kept = [run.record.layer(i).kept[0] for i in range(2)]
    assert len(set(held)) > 1, "the heads are all alike: this tests nothing"
    row = 2 * model.config.head_dim * 8 + 4  # keys and values in float64, and a position
    assert after_prompt == sum(held) * row + 2 * 2 * 8  # beside these only the number of each row

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, 50, 50, dtype=torch.bool)
        for head in range(4):
            allowed[:, head, n:, :n] = torch.isin(torch.arange(n), kept[layer][head // 2])
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_options_that_cannot_be_used_say_why():
    with pytest.raises(BadOption, match=r"adakv\.safeguard=1.5: it takes a share from 0 to 1. Leave it away for 0.2"):
        AdaKV(safeguard=1.5)
    with pytest.raises(BadOption, match=r"adakv\.window_tokens=0: no query would vote. Give at least 1"):
        AdaKV(window_tokens=0)
    with pytest.raises(BadOption, match=r"adakv\.pool_tokens=2: an even pooling width has no middle. Give an odd"):
        AdaKV(pool_tokens=2)
