"""Gates, maps by blocks and chosen blocks, against plain loops."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput
from saccade.core.selection import causal_mask
from tests.methods.handmade import noise

FEW = settings(max_examples=12)
SIZE = 4


def turn(x, shifts):
    """Two pairs of channels, at two speeds."""
    angle = shifts.to(x.dtype)[:, None] * torch.tensor([0.7, 0.1], dtype=x.dtype)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def tensors(n, queries, heads=4, groups=2):
    return noise(1, heads, queries, SIZE, name="q").double(), noise(1, groups, n, SIZE, name="k").double()


@FEW
@given(st.integers(1, 18), st.integers(1, 18), st.integers(1, 9), st.sampled_from([0, 1, 2]), st.integers(0, 5))
def test_a_gate_is_the_papers(n, queries, block, parts, first):
    queries = min(n, queries)
    q, k = tensors(n, queries)
    wide = max(1, parts) * SIZE
    keys = noise(2 if parts else 4, 3 * SIZE, wide, name="keys").double()
    gate = ops.Gate(keys, noise(4, SIZE, wide, name="queries").double() if parts else None)
    found = ops.block_gate(q, k, gate, turn, block=block, first=first)
    at = first + torch.arange(n)
    bare_q, bare_k = turn(q, -at[n - queries :]), turn(k, -at)
    for head in range(4):
        for i, a in enumerate(range(0, queries, block)):
            x = bare_q[0, head, a : a + block].mean(0)
            x = x if gate.queries is None else x @ gate.queries[head]
            start_q = at[n - queries + a : n - queries + a + 1]
            for j, c in enumerate(range(0, n, block)):
                some = bare_k[0, head // 2, c : c + block]
                y = torch.cat([some.amax(0), some.amin(0), some.mean(0)]) @ keys[head // 2 if parts else head]
                pairs = zip(x.split(SIZE), y.split(SIZE))
                score = sum(turn(u[None], start_q) @ turn(v[None], at[c : c + 1]).mT for u, v in pairs)
                torch.testing.assert_close(found[0, head, i, j], score[0, 0] / wide**0.5)


@FEW
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.sampled_from([None, 2.0]), st.booleans())
def test_a_pooled_map_is_the_pooled_map(n, queries, block, softcap, tight):
    queries = min(n, queries)
    q, k = tensors(n, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[ops.pooled_map.__module__], "LOGITS", 1 if tight else 2**20)
        found = ops.pooled_map(q, k, block, scale=0.8, softcap=softcap)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.8
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    p = logits.masked_fill(~causal_mask(queries, n), -torch.inf).softmax(-1)
    rows = [x.split(block, -1) for x in p.split(block, -2)]
    wanted = torch.stack([torch.stack([x.amax((-2, -1)) for x in row], -1) for row in rows], -2)
    torch.testing.assert_close(found, wanted)


@FEW
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 2, 4, 8]), st.integers(0, 40), st.integers(0, 3))
def test_chosen_blocks_are_the_best_within_the_pairs(n, queries, block, more, whole):
    queries = min(n, queries)
    row = min(n, (2 if (n - queries) % block else 1) * block + more)
    nqb, nkb = -(-queries // block), -(-n // block)
    score = noise(1, 3, nqb, nkb)
    options = {"queries": queries, "keys": n, "block": block}
    chosen = ops.choose_blocks(score, row_tokens=row, whole_last=whole, **options)
    allowed = sum(min(i + 1, row) for i in range(n - queries, n))
    mask, table = chosen.mask(), chosen.table()
    assert mask.sum((-2, -1)).max() <= max(allowed, queries)
    assert mask.diagonal(offset=n - queries, dim1=-2, dim2=-1).all()
    for i in range(nqb):
        own, last = (n - queries + i * block) // block, (min(n, n - queries + (i + 1) * block) - 1) // block
        counts = set()
        for head in range(3):
            kept, left = table[0, head, i, :own], score[0, head, i, :own]
            counts.add(int(kept.sum()))
            assert not table[0, head, i, last + 1 :].any()
            if kept.any() and not kept.all():
                assert left[kept].min() >= left[~kept].max()
        assert len(counts) == 1


@FEW
@given(st.integers(1, 40), st.integers(1, 8), st.sampled_from([0.0, 0.02, 0.2]))
def test_blocks_above_a_threshold(n, block, threshold):
    blocks = -(-n // block)
    score = 3 * noise(1, 2, blocks, blocks)
    chosen = ops.choose_blocks(score, queries=n, keys=n, block=block, threshold=threshold)
    share = score.masked_fill(~causal_mask(blocks, blocks), -torch.inf).softmax(-1)
    wanted = (share >= threshold) & causal_mask(blocks, blocks) | torch.eye(blocks, dtype=torch.bool)
    assert torch.equal(chosen.table(), wanted)
    assert threshold or chosen.mask().sum() == 2 * n * (n + 1) / 2


def test_the_last_rows_are_whole_where_an_eighth_of_the_pairs_pays_for_them():
    score, options = noise(1, 1, 64, 64), {"queries": 512, "keys": 512, "block": 8}
    chosen = {w: ops.choose_blocks(score, row_tokens=200, whole_last=w, **options) for w in (0, 2)}
    counts = {w: blocks.table().sum(-1)[0, 0] for w, blocks in chosen.items()}
    assert counts[2][-2:].tolist() == [63, 64] and counts[0][-2:].max() < 35
    assert counts[0].sum() - 1 <= counts[2].sum() <= counts[0].sum()


@FEW
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 2, 4, 8]), st.integers(0, 40))
def test_heads_and_rows_share_the_pairs_in_the_order_of_entries(n, queries, block, more):
    queries = min(n, queries)
    row = min(n, (2 if (n - queries) % block else 1) * block + more)
    entry = noise(2, 3, -(-queries // block), -(-n // block))
    chosen = ops.cover_blocks(entry, queries=queries, keys=n, block=block, row_tokens=row)
    allowed, table = 3 * sum(min(i + 1, row) for i in range(n - queries, n)), chosen.table()
    for b in range(2):
        there = [(h, i) for h in range(3) for i in range(entry.shape[2])]
        own = {(h, i): (n - queries + i * block) // block for h, i in there}
        paid = chosen.mask()[b].sum()
        assert paid <= allowed
        kept = {(h, i, j) for h, i, j in table[b].nonzero().tolist() if j < own[h, i]}
        left = sorted({(h, i, j) for h, i in there for j in range(own[h, i])} - kept, key=lambda x: entry[b][x])
        if left:
            h, i, j = left[0]
            assert all(entry[b][x] <= entry[b, h, i, j] for x in kept)
            assert paid + block * (min(queries, (i + 1) * block) - i * block) > allowed


@FEW
@given(st.integers(1, 9), st.booleans())
def test_the_mass_before_is_that_of_the_larger_ones(n, led):
    mass, first = noise(3, n, name="mass").exp(), noise(3, n, name="first") > 0.5 if led else None
    found = ops.mass_before(mass, first)
    for r in range(3):
        order = sorted(range(n), key=lambda i: (not (led and first[r, i]), -mass[r, i]))
        for place, i in enumerate(order):
            torch.testing.assert_close(found[r, i], mass[r, order[:place]].sum())


def test_what_does_not_fit_is_refused():
    q, k = tensors(5, 5)
    gate = ops.Gate(noise(4, 12, 4).double())
    with pytest.raises(BadInput, match=r"a gate over 5 queries and 4 keys in blocks of 2: queries are the last"):
        ops.block_gate(q, k[:, :, :4], gate, turn, block=2)
    with pytest.raises(BadInput, match=r"the map of 5 queries over 5 keys in blocks of 0: a row must see its own key"):
        ops.pooled_map(q, k, 0, scale=1.0)
    asked = "blocks of 2 for 5 queries over 5 keys, row_tokens=None, threshold=None"
    with pytest.raises(BadInput, match=rf"{asked}: the scores are for \(3, 3\) blocks\. Give scores of that shape"):
        ops.choose_blocks(noise(1, 4, 3, 3), queries=5, keys=5, block=2)
    with pytest.raises(BadInput, match=rf"{asked}: the scores are for \(3, 3\) blocks\. Give scores of that shape"):
        ops.cover_blocks(noise(1, 4, 3, 3), queries=5, keys=5, block=2)
