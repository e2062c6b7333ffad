"""Every kind of Selection against its meaning, pair by pair; density and count against the mask."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.core import rng
from saccade.core.selection import (
    Blocks,
    Buckets,
    Gather,
    Lines,
    Pairs,
    PerHead,
    Selection,
    Spans,
    Together,
    causal_mask,
    dense,
)
from tests.core import oracles

SEEDS = st.integers(0, 10**6)
BLOCK = st.sampled_from([1, 2, 3, 8, 64])


@st.composite
def shapes(draw, most: int = 40):
    """queries, keys, causal."""
    keys = draw(st.integers(1, most))
    return draw(st.integers(1, keys)), keys, draw(st.booleans())


def cut(n: int, size: int) -> int:
    return -(-n // size)


def assert_means(selection: Selection, wanted: torch.Tensor) -> None:
    """mask, count and density are those of the wanted [h q k] table (before causality), for one batch row."""
    wanted = torch.stack([oracles.causal(head, selection.causal) for head in wanted])[None]
    mask = selection.mask()
    assert mask.dtype == torch.bool and torch.equal(mask.expand_as(wanted), wanted)
    pairs = wanted.sum((-2, -1)).double()
    assert torch.equal(selection.count().expand_as(pairs), pairs)
    whole = oracles.causal(torch.ones_like(wanted[0, 0]), selection.causal).sum()
    assert selection.dense_pairs == whole
    assert torch.equal(selection.density(), selection.count() / whole)


@given(shapes(), BLOCK, BLOCK, SEEDS)
def test_blocks(shape, q_block, k_block, seed):
    queries, keys, causal = shape
    keep = torch.rand(1, 2, cut(queries, q_block), cut(keys, k_block), generator=rng.generator("b", seed)) < 0.4
    made = Blocks.of(keep, queries=queries, keys=keys, q_block=q_block, k_block=k_block, causal=causal)
    assert_means(made, torch.stack([oracles.blocks(k, queries, keys, q_block, k_block) for k in keep[0].tolist()]))
    assert torch.equal(made.table(), keep)
    assert made.crow.dtype == made.col.dtype == torch.int32 and made.kind == "blocks"
    for head, row in itertools.product(range(2), range(keep.shape[2])):
        a, b = made.crow[0, head, row : row + 2].tolist()
        assert made.col[0, head, a:b].tolist() == keep[0, head, row].nonzero()[:, 0].tolist()


@given(shapes(), BLOCK, SEEDS, st.booleans())
def test_gather(shape, block, seed, with_ranges):
    (queries, keys, causal), rows = shape, cut(shape[0], block)
    draw = rng.python("gather", seed)
    index, ranges = [], []
    for _ in range(2):
        order = [draw.sample(range(keys), keys) for _ in range(rows)]
        index.append([o[: keys // 3] + [-1] for o in order])
        # disjoint from the list: the longest run of keys that it leaves free, and an empty range
        ranges.append([[_free(set(i), keys), (keys, 0)] if with_ranges else [] for i in index[-1]])
    made = Gather(
        index=torch.tensor([index], dtype=torch.int32),
        ranges=torch.tensor([ranges], dtype=torch.int32) if with_ranges else None,
        q_block=block,
        queries=queries,
        keys=keys,
        causal=causal,
    )
    assert_means(made, torch.stack([oracles.gathered(i, r, queries, keys, block) for i, r in zip(index, ranges)]))


def _free(taken: set[int], keys: int) -> tuple[int, int]:
    runs = [list(g) for used, g in itertools.groupby(range(keys), taken.__contains__) if not used]
    best = max(runs, key=len, default=[0])
    return (best[0], best[-1] + 1) if runs else (0, 0)


@given(shapes(), st.lists(st.integers(0, 45), min_size=2, max_size=2), SEEDS, st.integers(1, 4))
def test_spans_on_a_line(shape, window, seed, dilation):
    queries, keys, causal = shape
    sinks = [seed % 5, seed % 7]
    made = Spans(
        sinks=torch.tensor(sinks),
        window=torch.tensor(window),
        dilation=dilation,
        queries=queries,
        keys=keys,
        causal=causal,
    )
    wanted = [oracles.line(s, w, dilation, queries, keys, causal) for s, w in zip(sinks, window)]
    assert_means(made, torch.stack(wanted))


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 3), st.booleans()
)
def test_spans_on_a_grid(axes, dilation, causal):
    grid, kernel = tuple(s for s, _ in axes), tuple(w for _, w in axes)
    n, none = torch.Size(grid).numel(), torch.zeros(1, dtype=torch.long)
    made = Spans(
        sinks=none, window=none, grid=grid, kernel=kernel, dilation=dilation, queries=n, keys=n, causal=causal
    )
    assert_means(made, oracles.neighbours(grid, kernel, dilation)[None])


@given(shapes(90), st.sampled_from([1, 4, 16, 64]), SEEDS)
def test_lines_are_the_walk_of_minference(shape, block, seed):
    (queries, keys, _), draw = shape, rng.python("lines", seed)
    verticals = [draw.sample(range(keys), draw.randint(0, min(6, keys))) for _ in range(2)]
    slashes = [[0, *draw.sample(range(1, keys), draw.randint(0, min(6, keys - 1)))] for _ in range(2)]
    v, s = (torch.tensor([[x + [-1] * (7 - len(x)) for x in lists]]).int() for lists in (verticals, slashes))
    made = Lines(verticals=v, slashes=s, block=block, queries=queries, keys=keys)
    assert_means(made, torch.stack([oracles.lines(v, s, queries, keys, block) for v, s in zip(verticals, slashes)]))
    as_lists = made.gather()
    assert torch.equal(as_lists.mask(), made.mask()) and torch.equal(as_lists.count(), made.count())
    tiles = made.tiles()
    live = tiles >= 0
    assert (tiles.diff(dim=-1)[live[..., 1:]] >= block).all(), "runs of one query block overlap"


@given(shapes(), SEEDS)
def test_buckets(shape, seed):
    (queries, keys, causal), draw = shape, rng.python("buckets", seed)
    q, k = ([[draw.randint(-1, 3) for _ in range(n)] for _ in range(2)] for n in (queries, keys))
    made = Buckets(
        q_bucket=torch.tensor([q]), k_bucket=torch.tensor([k]), queries=queries, keys=keys, causal=causal
    )
    offset = keys - queries
    wanted = [
        oracles.table(queries, keys, lambda i, j, a=a, b=b: a[i - offset] == b[j] and a[i - offset] >= 0)
        for a, b in zip(q, k)
    ]
    assert_means(made, torch.stack(wanted))


@given(shapes(), SEEDS, st.integers(1, 3))
def test_the_others_of_a_family_and_orders_that_are_given(shape, seed, family):
    (queries, keys, _), draw = shape, rng.python("families", seed)
    q, k = ([draw.randint(-1, 5) for _ in range(n)] for n in (queries, keys))
    offset, buckets = keys - queries, {"q_bucket": torch.tensor([[q]]), "k_bucket": torch.tensor([[k]])}
    place = {"queries": queries, "keys": keys, "causal": False}
    made = Buckets(**buckets, family=family, **place)

    def other(i, j):
        mine, there = q[i - offset], k[j]
        return min(mine, there) >= 0 and mine != there and mine // family == there // family

    assert_means(made, oracles.table(queries, keys, other)[None])
    some = [j for j in sorted(range(keys), key=k.__getitem__) if k[j] >= 0]  # those of no bucket left out
    given = replace(made, q_order=buckets["q_bucket"].sort(stable=True).indices, k_order=torch.tensor([[some]]).long())
    assert torch.equal(given.count(), made.count())
    own = replace(given, family=0)
    assert torch.equal(own.count(), own.mask().double().sum((-2, -1)))


@given(shapes(), SEEDS)
def test_places_are_the_pairs_and_never_fall(shape, seed):
    queries, keys, causal = shape
    q, k = (torch.randint(-1, 4, (1, 2, n), generator=rng.generator("places", seed, n)) for n in (queries, keys))
    made = Buckets(q_bucket=q, k_bucket=k[:, :1], queries=queries, keys=keys, causal=causal)
    p, found = made.places(), torch.zeros(1, 2, queries, keys, dtype=torch.bool)
    for head in range(2):
        for i, a, z in zip(p.q_order[0, head].tolist(), p.low[0, head].tolist(), p.high[0, head].tolist()):
            found[0, head, i, p.k_order[0, 0, a:z].long()] = True
    assert torch.equal(found, made.mask())
    assert (p.low.diff() >= 0).all() and (p.high.diff() >= 0).all()


def test_a_family_is_not_causal():
    with pytest.raises(AssertionError, match="causally, are no range of keys"):
        Buckets(q_bucket=torch.zeros(1, 1, 2), k_bucket=torch.zeros(1, 1, 2), family=2, queries=2, keys=2)


@given(shapes(), SEEDS)
def test_together_is_all_of_its_parts(shape, seed):
    place = {"queries": shape[0], "keys": shape[1], "causal": shape[2]}
    bucket = {"q_bucket": torch.arange(shape[0])[None, None] % 3, "k_bucket": torch.arange(shape[1])[None, None] % 3}
    own = Buckets(**bucket, **place)
    rest = Pairs(allowed=~own._pairs(), **place)
    made = Together(parts=(own, rest), times=(1.0, 2.0), **place)
    assert_means(made, dense(**place).mask()[0])


@given(shapes(), SEEDS)
def test_per_head_puts_every_head_in_its_place(shape, seed):
    (queries, keys, causal), place = shape, {"queries": shape[0], "keys": shape[1], "causal": shape[2]}
    order = rng.python("heads", seed).sample(range(5), 5)
    near = Spans(sinks=torch.zeros(2, dtype=torch.long), window=torch.tensor([1, 3]), **place)
    some = torch.rand(1, 3, queries, keys, generator=rng.generator("per head", seed)) < 0.5
    made = PerHead(
        parts=((torch.tensor(order[:2]), near), (torch.tensor(order[2:]), Pairs(allowed=some, **place))), **place
    )
    wanted = torch.empty(5, queries, keys, dtype=torch.bool)
    for head, window in zip(order[:2], (1, 3)):
        wanted[head] = oracles.line(0, window, 1, queries, keys, causal)
    wanted[order[2:]] = some[0]
    assert_means(made, wanted)


@given(shapes(), st.integers(0, 9), st.integers(0, 9))
def test_and_or_are_those_of_the_masks(shape, near, far):
    place = {"queries": shape[0], "keys": shape[1], "causal": shape[2]}
    a = Spans(sinks=torch.tensor([far]), window=torch.tensor([near]), **place)
    b = Buckets(
        q_bucket=torch.arange(shape[0])[None, None] % 3, k_bucket=torch.arange(shape[1])[None, None] % 3, **place
    )
    for joined, wanted in ((a & b, a.mask() & b.mask()), (a | b, a.mask() | b.mask())):
        assert_means(joined, wanted[0])
        assert joined.kind == "pairs"


def test_selections_of_different_shapes_do_not_join():
    with pytest.raises(AssertionError, match="selections of different shapes"):
        dense(3, 4) & dense(4, 4)


@given(shapes())
def test_dense_and_causal(shape):
    queries, keys, causal = shape
    assert_means(dense(queries, keys, causal), torch.ones(1, queries, keys, dtype=torch.bool))
    assert torch.equal(causal_mask(queries, keys), oracles.table(queries, keys, lambda i, j: j <= i))
    assert dense(queries, keys).offset == keys - queries


def test_more_queries_than_keys_see_all_of_them():
    assert_means(dense(9, 3, causal=False), torch.ones(1, 9, 3, dtype=torch.bool))
