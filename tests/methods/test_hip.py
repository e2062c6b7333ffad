"""The tree search against its own pseudo-code, disjoint regions, refresh in decoding, budgets with dense layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.errors import BadOption, CannotRun
from saccade.core.selection import Gather, Spans
from saccade.methods.sparse.hip import Hip
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

SHARES = st.floats(0.02, 1.0)


def tensors(n, queries=None):
    return noise(2, 4, queries or n, 8, name="q"), noise(2, 2, n, 8, name="k")


def searched(q, k, first, limit, most, rep, width=2, stride=2):
    """Blocks of one head by the paper's pseudo-code, one group at a time."""
    blocks = math.ceil(max(0, limit - first) / width)
    if not most:
        return set()
    groups = [(blocks * g // most, blocks * (g + 1) // most - blocks * g // most) for g in range(most)]
    share = blocks / most
    asking = q[min(stride, len(q)) - 1 :: stride]

    def value(group):
        at = group[0] + (group[1] // 2 if rep == "center" else 0)
        keys = [min(first + at * width + t, len(k) - 1) for t in range(width)]
        return float((asking @ k[keys].T).max())

    while share > 1:
        halves = [h for i, z in groups for h in ((i, z // 2), (i + z // 2, z - z // 2)) if h[1] >= 1]
        groups = sorted(halves, key=value, reverse=True)[:most]
        share /= 2
    tokens = {first + i * width + t for i, z in groups if z for t in range(width)}
    return {t for t in tokens if t < limit}


@given(st.integers(20, 200), st.floats(0.1, 0.9), st.sampled_from(["center", "first"]), st.sampled_from([1, 2, 3]))
def test_each_block_reads_what_the_pseudo_code_finds(n, share, rep, stride):
    method = Hip(rep=rep, sink_tokens=2, window_tokens=16, query_block_tokens=8, query_stride=stride)
    (q, k), here = tensors(n), site(share, queries=n, keys=n, layer=1)
    selection = method.select(q.double(), k.double(), here)
    if not isinstance(selection, Gather):
        assert here.budget.row_tokens(n) >= n or method._dense(here) > 1
        return
    sinks, window, most = method._sizes(n, here)
    block = selection.q_block
    padded = torch.cat([q, q[:, :, -1:].expand(-1, -1, -n % block, -1)], 2).double()
    for i in range(-(-n // block)):
        end = min((i + 1) * block, n)
        for head in (0, 3):
            found = {int(t) for t in selection.index[1, head, i] if t >= 0}
            asking = padded[1, head, i * block : (i + 1) * block]
            assert found == searched(asking, k[1, head // 2].double(), sinks, end - window, most, rep, stride=stride)


@given(st.integers(60, 150), st.floats(0.2, 0.6))
def test_a_group_may_search_together_by_its_largest_score(n, share):
    method = Hip(share_in_group=True, sink_tokens=2, window_tokens=16, query_block_tokens=8)
    (q, k), here = tensors(n), site(share, queries=n, keys=n, layer=3, layers=30)
    selection = method.select(q.double(), k.double(), here)
    index, block = selection.index, selection.q_block
    assert torch.equal(index[:, ::2], index[:, 1::2])
    sinks, window, most = method._sizes(n, here)
    for i in range(n // block):
        asking = q[1, 2:, i * block : (i + 1) * block][:, min(2, block) - 1 :: 2].flatten(0, 1).double()
        found = {int(t) for t in index[1, 3, i] if t >= 0}
        assert found == searched(asking, k[1, 1].double(), sinks, (i + 1) * block - window, most, "center", stride=1)


@given(st.integers(1, 200), SHARES, st.sampled_from(["center", "first", "oracle"]), st.sampled_from([0, 2]))
def test_regions_are_disjoint_within_the_budget_and_hold_the_query(n, share, rep, layer):
    here = site(share, queries=n, keys=n, layer=layer, layers=3)
    selection = Hip(rep=rep).select(*tensors(n), here)
    mask = selection.mask()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    if isinstance(selection, Gather):
        assert selection.ranges is not None
        listed = (selection.index >= 0).sum(-1) + selection.ranges.diff(dim=-1)[..., 0].clamp(min=0).sum(-1)
        union = replace(selection, causal=False).mask().sum(-1)
        assert torch.equal(listed.repeat_interleave(selection.q_block, 2)[:, :, :n], union)
    row = here.budget.row_tokens(n)
    if layer == 2:
        assert mask.sum(-1).max() <= row


@settings(max_examples=15)
@given(st.integers(1, 80), st.integers(2, 30), st.floats(0.05, 1.0))
def test_all_layers_together_stay_within_the_budget(n, layers, share):
    used = 0.0
    for layer in range(layers):
        here = site(share, queries=n, keys=n, layer=layer, layers=layers)
        used += float(Hip().select(*tensors(n), here).density().mean())
    assert used <= share * layers + 1e-9 or Hip()._row(n, here) == 1  # less than one key a row there cannot be


@given(st.integers(30, 120), st.floats(0.2, 0.9))
def test_oracle_representatives_find_the_best_blocks(n, share):
    method = Hip(rep="oracle", query_block_tokens=1, sink_tokens=1, window_tokens=4)
    (q, k), here = tensors(n), site(f"{max(1, int(share * n))}tok", queries=n, keys=n)
    selection = method.select(q, k, here)
    if not isinstance(selection, Gather):
        return
    sinks, window, most = method._sizes(n, here)
    for row in range(0, n, 7):
        limit = row + 1 - window
        keys = k[0, 1, sinks : max(sinks, limit) + (max(0, limit - sinks) % 2)]
        best = (keys @ q[0, 2, row]).view(-1, 2).amax(-1).topk(min(most, len(keys) // 2)).indices
        wanted = {sinks + int(b) * 2 + t for b in best for t in range(2)}
        assert {int(t) for t in selection.index[0, 2, row] if t >= 0} == {t for t in wanted if t < limit}


@given(st.integers(2, 150), st.integers(1, 30), SHARES, st.sampled_from([1, 3, 8]), st.integers(1, 30))
def test_decoding_at_once_reads_what_pieces_read(n, queries, share, refresh, piece):
    queries = min(queries, n)
    method, (q, k) = Hip(refresh_steps=refresh), tensors(n, queries)
    here = site(share, queries=queries, keys=n, stage="decode", layer=1)
    whole = method.select(q, k, here).mask()
    budget = [here.budget.tokens(there) for there in range(n - queries + 1, n + 1)]
    state: dict = {}
    for first in range(0, queries, piece):
        last = min(first + piece, queries)
        there = n - queries + last
        part = replace(here, queries=last - first, keys=there, seen=there, state=state)
        mask = method.select(q[:, :, first:last], k[:, :, :there], part).mask()
        assert torch.equal(mask, whole[:, :, first:last, :there])
        if method._dense(here) < 2:
            assert (mask.sum(-1) <= torch.tensor(budget[first:last])).all()
        assert mask.diagonal(offset=there - mask.shape[2], dim1=-2, dim2=-1).all()


def test_between_searches_the_list_stays_and_then_changes():
    q, k = tensors(400, 20)
    selection = Hip(refresh_steps=8).select(q, k, site("60tok", queries=20, keys=400, stage="decode"))
    index = selection.index[0, 0]
    assert torch.equal(index[0], index[7]) and torch.equal(index[8], index[15])
    assert not torch.equal(index[7], index[8]) and not torch.equal(index[15], index[16])


def test_a_cache_that_changed_is_searched_anew():
    q, k = tensors(300, 2)
    here = site("60tok", queries=1, keys=299, stage="decode", state={})
    Hip().select(q[:, :, :1], k[:, :, :299], here)
    shrunk = replace(here, keys=200, seen=300)
    found = Hip().select(q[:, :, 1:], k[:, :, 100:], shrunk)
    fresh = Hip().select(q[:, :, 1:], k[:, :, 100:], replace(shrunk, state={}))
    assert torch.equal(found.index, fresh.index)


def test_dense_layers_are_paid_for_and_bounded():
    layers = [Hip().select(*tensors(200), site(0.25, queries=200, keys=200, layer=i, layers=30)) for i in range(30)]
    assert [isinstance(s, Spans) for s in layers] == [True] * 3 + [False] * 27
    assert sum(float(s.density().mean()) for s in layers) / 30 <= 0.25
    assert Hip()._dense(site(0.1, queries=9, keys=9, layers=30)) == 1
    assert Hip()._dense(site("4tok", queries=9, keys=9, layers=30)) == 0


def test_in_a_model_prefill_and_decoding_are_under_its_mask():
    model, ids, n = tiny(), tokens(90), 60
    method = Hip(query_block_tokens=8, window_tokens=8)
    with attach(model, method, budget=0.4) as run:
        found = in_pieces(model, ids, [n, n + 1, n + 7])
    assert run.record.density("prefill") <= 0.4 and run.record.density("decode") <= 0.4

    def mask(layer, q, k):
        first = method.select(q[:, :, :n], k[:, :, :n], site(0.4, queries=n, keys=n, layer=layer)).mask()
        later = site(0.4, queries=90 - n, keys=90, layer=layer, stage="decode")
        rest = method.select(q[:, :, n:], k, later).mask()
        return torch.cat([torch.nn.functional.pad(first.expand(1, 4, n, n), (0, 90 - n)), rest.expand(1, 4, -1, -1)], 2)

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_a_full_budget_is_dense():
    model, ids = tiny(), tokens(70)
    with torch.no_grad():
        alone = model(ids).logits
    with attach(model, "hip"):
        torch.testing.assert_close(in_pieces(model, ids, [50]), alone)


def test_options_that_cannot_be():
    for name in ("refresh_steps", "query_block_tokens", "key_block_tokens", "window_tokens", "query_stride"):
        with pytest.raises(BadOption, match=rf"hip\.{name}=0: it takes at least 1"):
            Hip(**{name: 0})
    with pytest.raises(BadOption, match=r"hip\.dense_layers=-1: it takes a whole number from 0"):
        Hip(dense_layers=-1)
    with pytest.raises(BadOption, match=r"hip\.rep='last': it takes 'center' or 'first' or 'oracle'"):
        Hip(rep="last")
    with pytest.raises(CannotRun, match="the budget 4096B is in bytes"):
        attach(tiny(), "hip", budget="4KiB")
