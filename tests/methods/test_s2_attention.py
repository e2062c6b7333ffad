"""Stripes and bands against the paper's formula in plain loops; what the heads see together; budgets; training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, CannotRun
from saccade.core.selection import causal_mask
from saccade.methods.sparse.s2_attention import S2Attention, Shards, coverage
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask


def on(i, j, head, shards):
    """The sheet's formula, for tokens."""
    bi, bj = i // shards.block, j // shards.block
    column = shards.stride and (bj + head * shards.step) % shards.stride == 0
    return j <= i and (bi - bj < shards.local or bool(column))


def table(shards, heads, queries, keys):
    rows = range(keys - queries, keys)
    return torch.tensor([[[on(i, j, h, shards) for j in range(keys)] for i in rows] for h in range(heads)])


SIZES = {"block": st.integers(1, 9), "local": st.integers(1, 4), "stride": st.integers(1, 7)}


@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.fixed_dictionaries(SIZES))
@settings(max_examples=30, deadline=None)
def test_every_row_sees_what_the_formula_says(n, queries, homo, size):
    queries = min(queries, n)
    method = S2Attention(size["block"], size["local"], size["stride"], homo)
    here = site(queries=queries, keys=n)
    selection = method.select(noise(1, 4, queries, 8), noise(1, 2, n, 8), here)
    shards = Shards(size["block"], size["local"], size["stride"], 0 if homo else max(1, size["stride"] // 2))
    wanted = table(shards, 2, queries, n)
    assert torch.equal(selection.mask()[0], wanted.repeat_interleave(2, 0))
    at = torch.arange(n - queries, n)[None].expand(2, -1)
    seen = method.visible(at, torch.arange(n).expand(2, -1), torch.arange(2), site(queries=queries, keys=n))
    assert torch.equal(seen & causal_mask(queries, n), wanted)
    assert shards.held(2, n) == int(table(shards, 2, 1, n + 1)[..., :n].sum())


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 60), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_heads_together_see_the_whole_text(heads, stride, n, block):
    """Where there are as many heads as the stride is long, and only there; and a block that is gone stays gone."""
    here = site(queries=n, keys=n, heads=heads, kv_heads=heads)
    mask = S2Attention(block, 1, stride).select(noise(1, heads, n, 8), noise(1, heads, n, 8), here).mask()[0]
    together = torch.equal(mask.any(0), causal_mask(n, n))
    shards = Shards(block, 1, stride, max(1, stride // heads))
    full = coverage(shards, heads) == 1
    assert full == (heads >= stride) and (together or not full)
    if n >= (stride + 1) * block and not full:
        assert not together
    ended = (mask[:, block:] <= mask[:, :-block]) | ~causal_mask(n, n)[:-block]
    assert ended.all()


@given(st.floats(0.02, 0.99), st.integers(1, 300), st.integers(1, 8), st.booleans(), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_budget_is_kept_and_every_head_has_a_key(share, n, heads, homo, dense_layers):
    if dense_layers and Budget(share).unpaid(2, dense_layers):
        return
    method, held = S2Attention(homo_head=homo, dense_layers=dense_layers), 0
    for layer in range(2):
        shards = method.shards(n, site(share, queries=n, keys=n, layer=layer, kv_heads=heads, heads=heads))
        held += heads * n if shards is None else shards.held(heads, n)
        if shards is not None:
            assert shards.held(heads, n) >= heads and table(shards, heads, 1, n + 1)[..., :n].any(-1).all()
            assert shards.held(heads, n) == int(table(shards, heads, 1, n + 1)[..., :n].sum())
    assert held <= 2 * heads * Budget(share).tokens(n)


@pytest.mark.parametrize("budget", ["1tok", "6tok", 0.1, 0.5])
def test_under_a_budget_the_pattern_is_that_of_its_shards(budget):
    here, method = site(budget, queries=50, keys=50), S2Attention(8)
    wanted = table(method.shards(50, here), 2, 50, 50).repeat_interleave(2, 0)
    assert torch.equal(method.select(noise(1, 4, 50, 8), noise(1, 2, 50, 8), here).mask()[0], wanted)


def test_most_of_the_budget_is_spent():
    shards = S2Attention().shards(4096, site(0.25, queries=1, keys=4096, heads=8, kv_heads=8))
    assert shards[:2] == (64, 4) and shards.held(8, 4096) > 0.9 * 8 * 1024


@pytest.mark.parametrize("method", [S2Attention(4, 2, 3), S2Attention(4, 1, 2, homo_head=True)], ids=["shards", "homo"])
@given(cuts=st.lists(st.integers(1, 59), min_size=1, max_size=4, unique=True).map(sorted))
@settings(max_examples=3, deadline=None)
def test_a_model_computes_under_that_mask_in_any_pieces(method, cuts):
    model, ids = tiny(), tokens(60)
    with attach(model, method) as run:
        found = in_pieces(model, ids, cuts)
    shards = method._of(method.block_tokens, method.local_blocks, method.vert_stride, 2)
    mask = table(shards, 2, 60, 60).repeat_interleave(2, 0)[None]
    torch.testing.assert_close(found, under_mask(model, ids, lambda layer, q, k: mask))
    assert run.record.kept_fraction == shards.held(2, 60) / 120


def test_it_is_trained_through():
    """Gradients of all weights are those of a dense pass under the mask."""
    method, ids, n = S2Attention(8, 1, 2), tokens(50), 50
    shards = method._of(8, 1, 2, 2)
    mask = table(shards, 2, n, n).repeat_interleave(2, 0)[None]
    ours, theirs = tiny().train(), tiny().train()
    with attach(ours, method):
        ours(ids, labels=ids).loss.backward()
    theirs.set_attn_implementation("eager")
    added = torch.zeros(1, 4, n, n, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    theirs(ids, labels=ids, attention_mask=added).loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_dense_layers_see_everything():
    here = site(0.75, queries=40, keys=40)
    method = S2Attention(dense_layers=1)
    assert method.shards(40, here) is None
    behind = site(0.75, queries=40, keys=40, layer=1)
    assert method.shards(40, behind).held(2, 40) <= 2 * 20
    assert "dense_layers=1 of 2 layers alone exceed budget=0.5" in method.check(site(0.5, queries=9, keys=9))[0]


def test_what_cannot_run_is_refused():
    with pytest.raises(BadOption, match=r"s2-attention\.local_blocks=0: it takes at least 1"):
        S2Attention(local_blocks=0)
    with pytest.raises(CannotRun, match=r"vert_stride=4 says what is seen, and would ignore the budget 0\.5"):
        attach(tiny(), S2Attention(vert_stride=4), budget=0.5)
