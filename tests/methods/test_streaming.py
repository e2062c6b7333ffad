"""Attention sinks against a dense pass under their mask, however the text is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.core.budget import Budget
from saccade.methods.cache.streaming import Streaming
from tests.methods.handmade import in_pieces, site, tiny, tokens, under_mask

MODEL, N = tiny(), 30


def lambda_mask(n, sinks, window):
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return ((j < sinks) | (i - j <= window)).expand(1, 1, n, n)


@given(st.integers(1, 35), st.integers(0, 6), st.lists(st.integers(1, N - 1), min_size=1, max_size=6, unique=True))
@settings(max_examples=10, deadline=None)
def test_a_budget_in_tokens_is_the_mask_however_the_text_is_cut(held, sinks, cuts):
    ids = tokens(N)
    with attach(MODEL, Streaming(sink_tokens=sinks), budget=f"{held}tok") as run:
        found = in_pieces(MODEL, ids, sorted(cuts))
        kept = run.record.layer(0).kept[0]
    first = min(sinks, held)
    expected = under_mask(MODEL, ids, lambda *_: lambda_mask(N, first, held - first).expand(1, 4, N, N))
    torch.testing.assert_close(found, expected)
    near = torch.arange(max(0, N - (held - first)), N)
    assert all(torch.equal(head.long(), torch.cat([torch.arange(first), near]).unique()[: len(head)]) for head in kept)
    assert all(len(head) == min(held, N) for head in kept)


@given(st.floats(0.05, 1.0), st.integers(1, N), st.integers(0, 6))
@settings(max_examples=10, deadline=None)
def test_a_fraction_is_never_exceeded_and_keeps_at_least_one_key(share, n, sinks):
    with attach(MODEL, Streaming(sink_tokens=sinks), budget=share) as run, torch.no_grad():
        cache = MODEL(tokens(N)[:, :n], use_cache=True)[CACHE]
        assert all(len(h) == Budget.of(share).tokens(n) for h in run.record.layer(1).kept[0])
        MODEL(tokens(5), **{CACHE: cache})
        assert all(1 <= len(h) <= Budget.of(share).tokens(n + 5) for h in run.record.layer(1).kept[0])


def test_everything_is_dense():
    ids = tokens(N)
    with attach(MODEL, "streaming", budget=1.0):
        found = in_pieces(MODEL, ids, [11, 12])
    with torch.no_grad():
        torch.testing.assert_close(found, MODEL(ids).logits)


@pytest.mark.parametrize("budget", ["6tok", 0.2])
def test_many_tokens_at_once_are_read_as_one_by_one(budget):
    ids = tokens(N)
    with attach(MODEL, "streaming", budget=budget):
        torch.testing.assert_close(in_pieces(MODEL, ids, [20]), in_pieces(MODEL, ids, [*range(20, N)]))


@given(st.integers(1, 12), st.integers(0, 20), st.integers(0, 6))
def test_what_was_out_of_sight_stays_out_of_sight(held, start, sinks):
    method, here = Streaming(sink_tokens=sinks), site(f"{held}tok", queries=9, keys=start + 9)
    at, keys = torch.arange(start, start + 9)[None], torch.arange(start + 9)[None]
    sees = method.visible(at, keys, torch.zeros(1), here)[0]
    lost = ~sees & (keys <= at.T)
    assert (lost[1:] | ~lost[:-1]).all()
    assert sees[torch.arange(9), at[0]].all()
