"""Rows that grow token by token: in place where there is room, and never into what another has written."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saccade.attach.store import SPARE, Bucket, Store
from saccade.core import rng


def _columns(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draw = rng.generator("tests/store", rows, tokens, seed)
    made = {"keys": torch.randn(rows, tokens, 3, generator=draw), "label": torch.randn(rows, tokens, generator=draw)}
    return torch.randint(0, 99, (rows, tokens), generator=draw, dtype=torch.int32), made


def _bucket(rows: int, tokens: int) -> Bucket:
    return Bucket(torch.arange(rows), *_columns(rows, tokens, 0))


def _alike(bucket: Bucket, positions: torch.Tensor, columns: dict[str, torch.Tensor]) -> None:
    assert torch.equal(bucket.positions, positions)
    for name, x in columns.items():
        assert torch.equal(bucket.columns[name], x)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 3), tokens=st.integers(0, 80), more=st.lists(st.integers(0, 5), max_size=12))
def test_growing_is_putting_behind(rows, tokens, more):
    bucket, (positions, columns) = _bucket(rows, tokens), _columns(rows, tokens, 0)
    for seed, n in enumerate(more, 1):
        new_positions, new = _columns(rows, n, seed)
        bucket = bucket.append(new_positions, new)
        positions = torch.cat([positions, new_positions], 1)
        columns = {name: torch.cat([x, new[name]], 1) for name, x in columns.items()}
    _alike(bucket, positions, columns)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(SPARE, 90), steps=st.integers(1, 4))
def test_two_texts_that_begin_alike_do_not_write_over_each_other(tokens, steps):
    one = _bucket(2, tokens).append(*_columns(2, 1, 1))
    first = second = one
    for step in range(steps):
        first = first.append(*_columns(2, 1, 10 + step))
        second = second.append(*_columns(2, 1, 20 + step))
    for bucket, start in ((first, 10), (second, 20)):
        parts = [_columns(2, tokens, 0), _columns(2, 1, 1), *(_columns(2, 1, start + step) for step in range(steps))]
        joined = {name: torch.cat([c[name] for _, c in parts], 1) for name in parts[0][1]}
        _alike(bucket, torch.cat([p for p, _ in parts], 1), joined)


def test_most_tokens_copy_nothing():
    bucket, places = _bucket(2, 20 * SPARE), set()
    for step in range(20):
        bucket = bucket.append(*_columns(2, 1, step))
        places.add(bucket.columns["keys"].data_ptr())
    assert len(places) == 1
    held = bucket.columns["keys"].untyped_storage().nbytes()
    assert held <= bucket.columns["keys"].nbytes * (1 + 1 / SPARE)


def test_what_is_there_already_does_not_move_and_what_moves_leaves_its_room():
    store = Store(1, 2)
    bucket = _bucket(2, 5 * SPARE).append(*_columns(2, 1, 1))
    store.buckets = [replace(bucket, packed={"units": torch.zeros(2, 3)})]
    (before,) = store.buckets
    store.move(torch.device("cpu"))
    assert store.buckets[0] is before and before.space is not None
    store.move(torch.device("meta"))
    assert store.buckets[0].space is None
    assert {x.device.type for x in store.tensors()} == {"meta"} and len(store.tensors()) == len(before.tensors())


@settings(max_examples=200, deadline=None)
@given(rules=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=8))
@example(rules=[(0, 1, 1), (2, 0, 2), (0, 3, 1), (0, 3, 1)])  # two gaps
def test_slots_out_of_reach_are_those_that_positions_say(rules):
    """Sinks and recent tokens, any of them after any other, as tokens come."""
    bucket, seen, told = _bucket(2, 0), 0, []
    for sinks, recent, more in rules:
        new = torch.arange(seen, seen + more, dtype=torch.int32).expand(2, -1)
        bucket, seen = bucket.append(new, _columns(2, more, seen)[1]), seen + more
        sees = (bucket.positions < sinks) | (seen - bucket.positions <= recent)
        gone = bucket.out_of_reach(sinks, recent, seen, seen)
        told.append(gone is not None)
        left = bucket.positions[sees].view(2, -1)
        if gone is None:
            bucket = bucket.take(sees.nonzero()[:, 1].view(2, -1))
        elif gone[1]:
            bucket = bucket.without(*gone)
        assert torch.equal(bucket.positions, left)
    assert told[0], "nothing was dropped before"


def test_a_window_that_moves_asks_no_positions():
    bucket = _bucket(2, 0).append(torch.arange(20, dtype=torch.int32).expand(2, -1), _columns(2, 20, 0)[1])
    for seen in range(20, 30):
        first, count = bucket.out_of_reach(4, 8, seen, seen)
        bucket = bucket.without(first, count) if count else bucket
        assert bucket.positions[0].tolist() == [0, 1, 2, 3, *range(seen - 8, seen)]
        bucket = bucket.append(torch.full((2, 1), seen, dtype=torch.int32), _columns(2, 1, seen)[1])
