"""SnapKV against the paper's listing written out, and inside a model against a dense pass under the kept keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.budget import Budget
from saccade.core.errors import BadOption
from saccade.core.site import Seen
from saccade.methods.cache.snapkv import SnapKV
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

options = st.builds(
    SnapKV,
    window_tokens=st.integers(1, 9),
    pool_tokens=st.sampled_from([1, 3, 5, 7]),
    pooling=st.sampled_from(["max", "avg"]),
    group=st.sampled_from(["mean", "max"]),
)


def listing(q, k, method):
    """The listing of the paper in float64, one head at a time; None for keys of the window."""
    (b, h, w, d), (g, n) = q.shape, k.shape[1:3]
    out = torch.zeros(b, h, n - w, dtype=torch.float64)
    for row in range(b):
        for head in range(h):
            logits = q[row, head].double() @ k[row, head // (h // g)].double().T / d**0.5
            logits[:, n - w :] += torch.full((w, w), -torch.inf).triu(1)
            votes = logits.softmax(-1)[:, : n - w].sum(0)
            half = method.pool_tokens // 2
            for j in range(n - w):
                near = votes[max(0, j - half) : j + half + 1]
                out[row, head, j] = near.max() if method.pooling == "max" else near.sum() / method.pool_tokens
    by_group = out.unflatten(1, (g, h // g))
    return by_group.mean(2) if method.group == "mean" else by_group.amax(2)


@given(options, st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_votes_are_those_of_the_listing(method, n):
    w = min(method.window_tokens, n)
    q, k = noise(2, 4, w, 8, name="q"), noise(2, 2, n, 8, name="k")
    found = method.score(Seen(k, k, torch.arange(n).expand(2, 2, n), q), site(1.0, queries=0, keys=n))
    expected = listing(q, k, method)
    logits = q @ k.repeat_interleave(2, 1).mT
    error = (logits.softmax(-1) - (q.double() @ k.double().repeat_interleave(2, 1).mT).softmax(-1)).abs().max()
    torch.testing.assert_close(found[..., : n - w].double(), expected, atol=2 * w * float(error), rtol=0)
    assert (found[..., n - w :] == torch.inf).all()


@given(options, st.integers(1, 40), st.sampled_from(["1tok", "3tok", "7tok", 0.1, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_most_recent_keys_win_and_the_budget_holds(method, n, budget):
    w = min(method.window_tokens, n)
    here = site(budget, queries=0, keys=n)
    q, k = noise(1, 4, w, 8, name="q"), noise(1, 2, n, 8, name="k")
    scores = method.score(Seen(k, k, torch.arange(n).expand(1, 2, n), q), here)
    count = int(method.allocate(scores, here.budget, here)[0, 0])
    assert 1 <= count <= Budget.of(budget).tokens(n)
    kept = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    surest = torch.arange(n - min(w, count), n)
    assert all(torch.isin(surest, head).all() for head in kept.flatten(0, 1))


@pytest.mark.parametrize("budget", [0.3, "5tok", 1.0])
def test_decoding_sees_the_kept_keys_and_nothing_else(budget):
    model, ids, n = tiny(), tokens(50), 40
    with attach(model, SnapKV(window_tokens=8, pool_tokens=3), budget=budget) as run:
        found = in_pieces(model, ids, [n, n + 1, n + 2, n + 6])
        kept = [run.record.layer(i).kept[0] for i in range(2)]

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, 50, 50, dtype=torch.bool)
        for head in range(4):
            allowed[:, head, n:, :n] = torch.isin(torch.arange(n), kept[layer][head // 2])
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))
    held = Budget.of(budget).tokens(n)
    assert all(len(head) == held + 10 for layer in kept for head in layer)


def test_a_prompt_in_chunks_keeps_the_same():
    model, ids = tiny(), tokens(41)
    kept = []
    for chunk in (None, 7):
        with attach(model, SnapKV(window_tokens=10), budget=0.4) as run:
            model.generate(ids, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk, pad_token_id=0)
            kept.append(run.record.layer(1).kept[0])
    assert all(torch.equal(a, b) for a, b in zip(*kept))


def test_options_that_cannot_be_used_say_why():
    with pytest.raises(BadOption, match=r"window_tokens=0: no query would vote. Give at least 1"):
        SnapKV(window_tokens=0)
    with pytest.raises(BadOption, match=r"pool_tokens=4: an even pooling width has no middle. Give an odd number"):
        SnapKV(pool_tokens=4)
