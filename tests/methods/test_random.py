"""Random selection: within the budget, never blind, and the same for the same seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.errors import BadOption, CannotRun
from saccade.core.site import Seen
from saccade.methods.sparse.random import Random
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

SHARES = st.floats(0.02, 1.0)


def chosen(part, n, share, queries=None, **changes):
    here = site(share, queries=queries or n, keys=n, stage=part, **changes)
    return Random(part=part).select(noise(1, 4, here.queries, 8), noise(1, 2, n, 8), here)


@given(st.integers(1, 150), SHARES)
def test_blocks_stay_within_the_budget_and_hold_the_diagonal(n, share):
    selection = chosen("prefill", n, share)
    mask = selection.mask()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    allowed = max(n, sum(min(i + 1, site(share, queries=n, keys=n).budget.row_tokens(n)) for i in range(n)))
    assert mask.sum((-2, -1)).max() <= allowed
    if share == 1.0:
        assert mask.sum((-2, -1)).min() == n * (n + 1) // 2


@given(st.integers(200, 400), st.integers(1, 150), st.floats(0.2, 0.9))
def test_a_later_chunk_of_a_prompt_sees_itself(n, queries, share):
    mask = chosen("prefill", n, share, min(queries, n)).mask()
    assert mask.diagonal(offset=n - mask.shape[2], dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_most_of_the_budget_is_spent(share):
    assert chosen("prefill", 1024, share).density().mean() > 0.85 * share


@given(st.integers(1, 60), st.integers(1, 8), SHARES)
def test_decoding_reads_the_newest_key_and_as_many_as_allowed(n, queries, share):
    queries = min(queries, n)
    mask = chosen("decode", n, share, queries).mask()[0]
    budget = site(share, queries=1, keys=n).budget
    for i in range(queries):
        there = n - queries + i + 1
        assert (mask[:, i].sum(-1) == budget.tokens(there)).all() and mask[:, i, there - 1].all()


def test_decoding_at_once_reads_what_single_steps_read():
    mask = chosen("decode", 50, 0.3, 6).mask()
    for i in range(6):
        step = chosen("decode", 45 + i, 0.3, 1).mask()
        assert torch.equal(mask[:, :, i : i + 1, : 45 + i], step)


@given(st.integers(2, 60))
def test_eviction_keeps_the_newest_key(n):
    keys, here = noise(2, 2, n, 8), site(0.5, queries=0, keys=n)
    scores = Random().score(Seen(keys, keys, torch.arange(n).expand(2, 2, n)), here)
    assert (scores.argmax(-1) == n - 1).all() and torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0, 0, :-1], scores[0, 1, :-1])


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_seed_layer_and_nothing_else_decide(part):
    first = chosen(part, 120, 0.3).mask()
    assert torch.equal(first, chosen(part, 120, 0.3).mask())
    assert not torch.equal(first, chosen(part, 120, 0.3, seed=1).mask())
    assert not torch.equal(first, chosen(part, 120, 0.3, layer=1).mask())


@pytest.mark.parametrize("part", ["prefill", "decode", "evict"])
def test_in_a_model_each_part_computes_its_own_choice(part):
    model, ids, n = tiny(), tokens(60), 40
    with attach(model, Random(part=part), budget=0.5) as run:
        found = in_pieces(model, ids, [n])
        kept = [run.record.layer(i).kept[0] for i in range(2)]

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, 60, 60, dtype=torch.bool)
        if part == "prefill":
            allowed[:, :, :n, :n] = chosen(part, n, 0.5, layer=layer).mask()
        elif part == "decode":
            allowed[:, :, n:] = chosen(part, 60, 0.5, 20, layer=layer).mask()
        else:
            for head in range(4):
                allowed[:, head, n:, :n] = torch.isin(torch.arange(n), kept[layer][head // 2])
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_options_and_budgets_that_cannot_be():
    with pytest.raises(BadOption, match=r"random\.block_tokens=0: it takes at least 1"):
        Random(block_tokens=0)
    with pytest.raises(BadOption, match=r"random\.part='steer': it takes 'evict' or 'prefill' or 'decode'"):
        dataclasses.replace(Random(), part="steer")
    with pytest.raises(CannotRun, match="leaves out pairs, not memory, and the budget 4096B is in bytes"):
        attach(tiny(), Random(part="prefill"), budget="4KiB")
