"""index_keys: searches against plain loops, and what a graph built from queries must hold."""

from __future__ import annotations

import dataclasses
import importlib.util
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.ops.nearest import graph
from tests.methods.handmade import noise

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
sizes = st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 12), st.integers(0, 99))
LONG = 400  # keys, of which a search visits some


def drawn(g, n, m, seed, d=8):
    """Keys, and queries that lie elsewhere, in float64: no two products are equal."""
    keys = noise(g, n, d, name=f"keys {seed}").double()
    return keys, noise(g, m, d, name=f"queries {seed}").double() + 2


def ranked(q, keys):
    """Key numbers, best first."""
    score = [sum(float(a) * float(b) for a, b in zip(q, key)) for key in keys]
    return sorted(range(len(keys)), key=lambda j: -score[j])


@given(sizes, st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_flat_sorts_all_keys(size, count):
    keys, queries = drawn(*size)
    found = ops.index_keys(keys, queries, "flat").search(queries, count)
    for head in range(len(keys)):
        for row, q in enumerate(queries[head]):
            assert found.index[head, row].tolist() == ranked(q, keys[head])[:count]
    torch.testing.assert_close(found.score, (queries @ keys.mT).gather(-1, found.index.long()))
    assert found.visited == queries.shape[:2].numel() * keys.shape[1]


@given(sizes, st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_a_beam_as_wide_as_there_are_keys_finds_all(size, degree):
    keys, queries = drawn(*size)
    asking = queries.flip(1) + noise(*queries.shape, name="others")
    made = ops.index_keys(keys, queries, "graph", beam=keys.shape[1], degree=degree)
    count = max(1, keys.shape[1] // 2)
    found = made.search(asking, count)
    assert torch.equal(found.index, ops.index_keys(keys, queries, "flat").search(asking, count).index)
    assert found.visited == queries.shape[:2].numel() * keys.shape[1], "every key can be reached"


@given(st.integers(20, 60), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_neighbours_stand_beside_each_other_in_a_list(n, m, degree, seed):
    """All but the last neighbour; with the first of a list all others do."""
    keys, queries = drawn(1, n, m, seed)
    with mock.patch.object(graph, "LISTED", 8):
        edges = ops.index_keys(keys, queries, "graph", degree=degree).edges[0]
    lists = [ranked(q, keys[0])[:8] for q in queries[0]]
    beside = {(a, b) for row in lists for i, a in enumerate(row) for j, b in enumerate(row)
              if i != j and (abs(i - j) <= graph.BESIDE or 0 in (i, j))}  # fmt: skip
    for key, row in enumerate(edges[:, :-1].tolist()):
        there = [x for x in row if x >= 0]
        assert len(there) == len(set(there)) <= degree
        assert {(key, x) for x in there} <= beside
        assert len(there) == min(degree, sum(a == key for a, _ in beside)), "no room is wasted"
    assert len(edges[:, -1][edges[:, -1] >= 0].unique()) == int((edges[:, -1] >= 0).sum()), "one anchor for each"


def test_the_neighbours_that_share_most_queries_come_first_but_for_hidden_ones():
    """Of key 0: 1 and 2 share most queries with it and lie together, so that 2 is hidden, and comes after 3."""
    keys = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.1, 0.0], [-2.0, 0.0], [0.0, 9.0]])
    near = torch.tensor([[1, 2, 3, 4]] + [[-1] * 4] * 4)
    assert graph._thinned(keys, near, 2)[0].tolist() == [1, 3]
    assert graph._thinned(keys, near, 3)[0].tolist() == [1, 3, 4]
    assert graph._thinned(keys, near, 4)[0].tolist() == [1, 3, 4, 2], "there is room for all"


def best_first(made, head, q, width):
    """The beam of one query, best first, and how many keys were looked at."""
    score = (made.keys[head] @ q).tolist()
    beam = met = set(made.entries[head].tolist())
    beam, followed = sorted(beam, key=lambda j: -score[j])[:width], set()
    while True:
        here = [j for j in beam if j not in followed][: graph.WIDTH]
        if not here:
            return beam, len(met)
        followed |= set(here)
        new = {x for j in here for x in made.edges[head, j].tolist() if x >= 0} - met
        met = met | new
        beam = sorted({*beam, *new}, key=lambda j: -score[j])[:width]


@given(st.integers(1, 2), st.integers(0, 99), st.integers(1, 40), st.integers(1, 60), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_a_search_follows_the_best_keys_first(g, seed, count, beam, degree):
    keys, queries = drawn(g, LONG, 20, seed)
    asking = queries[:, :5] + noise(g, 5, 8, name="others")
    made = ops.index_keys(keys, queries, "graph", beam=beam, degree=degree)
    found, looked = made.search(asking, count), 0
    with mock.patch.object(graph, "ROWS", 3):
        assert torch.equal(made.search(asking, count).index, found.index), "whoever is searched for beside"
    for head in range(g):
        for row, q in enumerate(asking[head]):
            expected, visited = best_first(made, head, q, max(beam, count))
            expected += [-1] * (count - len(expected))
            assert found.index[head, row].tolist() == expected[:count]
            looked += visited
    assert found.visited == looked
    there = found.index >= 0
    products = (asking @ keys.mT).gather(-1, found.index.clamp(min=0).long())
    torch.testing.assert_close(found.score, torch.where(there, products, -torch.inf))


@pytest.mark.parametrize("kind", ["graph", pytest.param("graph-faiss", marks=needs_faiss)])
def test_a_graph_from_queries_finds_more_than_it_visits(kind):
    """Of keys that queries elsewhere want: nearly all, of few that are looked at."""
    keys, queries = noise(1, 4000, 16, name="keys"), noise(1, 600, 16, name="queries") + 1.5
    made = ops.index_keys(keys, queries[:, :500], kind, beam=32)
    found = made.search(queries[:, 500:], 10)
    best = ops.index_keys(keys, queries, "flat").search(queries[:, 500:], 10)
    recall = (found.index[..., None] == best.index[..., None, :]).any(-1).float().mean()
    assert recall > 0.9 and found.visited < 0.1 * best.visited


@needs_faiss
@given(sizes, st.integers(1, 30))
@settings(max_examples=10, deadline=None)
def test_all_clusters_and_the_widest_beam_are_exact(size, count):
    keys, queries = (x.float() for x in drawn(*size))
    best = ops.index_keys(keys, queries, "flat").search(queries, count)
    found = ops.index_keys(keys, queries, "ivf", probes=1000).search(queries, count)
    assert torch.equal(found.index, best.index)
    torch.testing.assert_close(found.score, best.score)
    assert found.visited == best.visited
    near = ops.index_keys(keys, queries, "hnsw", beam=1000, degree=60).search(queries, count)
    assert torch.equal(near.index, best.index)


@needs_faiss
@given(sizes, st.integers(1, 30), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_faiss_follows_our_graph_to_every_key(size, count, dtype, degree):
    keys, queries = (x.to(dtype) for x in drawn(*size))
    best = ops.index_keys(keys, queries, "flat").search(queries, count)
    found = ops.index_keys(keys, queries, "graph-faiss", beam=1000, degree=degree).search(queries, count)
    torch.testing.assert_close(found.score, best.score.to(found.score.dtype), rtol=1e-3, atol=1e-3)
    there = (found.index >= 0).sum(-1)
    assert torch.equal(there, (best.index >= 0).sum(-1)) and found.index.dtype == torch.int32


@needs_faiss
@pytest.mark.parametrize("kind", ["hnsw", "ivf", "graph-faiss"])
def test_what_moves_finds_the_same(kind):
    keys, queries = (x.float() for x in drawn(2, 300, 20, 1))
    made = ops.index_keys(keys, queries, kind, beam=8, probes=3)
    moved = made.moved(torch.clone)
    assert moved.keys.data_ptr() != keys.data_ptr() and torch.equal(moved.keys, keys)
    a, b = made.search(queries, 20), moved.search(queries, 20)
    assert torch.equal(a.index, b.index) and a.visited == b.visited
    assert sum(t.nbytes for t in made.tensors()) > 2 * keys.nbytes, "faiss holds them once more"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_compared_in_float32(dtype):
    keys, queries = (x.to(dtype) for x in drawn(2, 300, 20, 1))
    wide = ops.index_keys(keys.float(), queries.float(), "graph").search(queries.float(), 20)
    found = ops.index_keys(keys, queries, "graph").search(queries, 20)
    assert torch.equal(found.index, wide.index) and found.score.dtype == torch.float32


def test_a_library_that_is_missing_is_said():
    text = (
        r"index keys with kind='ivf': index='ivf' needs faiss, which is not installed: pip install"
        r" 'saccade\[retrieval\]'\. Or take 'graph' or 'flat'\."
    )
    with mock.patch.object(importlib.util, "find_spec", lambda name: None), pytest.raises(CannotRun, match=text):
        ops.index_keys(*drawn(1, 4, 4, 0), "ivf")


def test_what_cannot_be_indexed_says_why():
    keys, queries = drawn(2, 4, 4, 0)
    text = r"kind='tree': there is no such index\. Take one of: graph, graph-faiss, flat, hnsw, ivf\."
    with pytest.raises(BadOption, match=text):
        ops.index_keys(keys, queries, "tree")
    for name in ("beam", "probes", "degree"):
        with pytest.raises(BadOption, match=rf"index keys with {name}=0: it takes at least 1\. Give such a number\."):
            ops.index_keys(keys, queries, **{name: 0})
    with pytest.raises(BadInput, match=r"index keys \(2, 4, 8\) for queries \(1, 4, 8\): they are not \[heads, any"):
        ops.index_keys(keys, queries[:1])
    with pytest.raises(BadInput, match=r"queries \(2, 0, 8\): there is nothing to index\. Give one key"):
        ops.index_keys(keys, queries[:, :0])


def test_options_of_a_made_index_can_be_changed():
    made = ops.index_keys(*drawn(1, LONG, 20, 3), "graph")
    few = dataclasses.replace(made, beam=1).search(made.keys[:, :4], 1)
    assert few.visited < made.search(made.keys[:, :4], 1).visited
