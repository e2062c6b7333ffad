"""What the queries after a prompt read, noted by position: every key counted once, whatever lies where."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, reading
from saccade.attach.compat import CACHE
from saccade.core.record import LayerRecord
from saccade.core.registry import card, list_methods
from saccade.core.selection import Pairs
from tests.conformance.cases import Case, equipped, tiny
from tests.methods.handmade import tokens

PROMPT, REST = 40, 6
BUDGET = 0.75  # so that the layers of tidaldecode that read everything are paid for
READERS = [name for name in list_methods() if card(name).family == "decode"]
MODEL = functools.partial(tiny, 4, 2, 16)


@torch.no_grad()
def read(methods, rows: int = 1, **given):
    """The run, after a prompt and some tokens in two forwards."""
    model, ids = MODEL(), tokens(PROMPT + REST, rows)
    with attach(model, methods, budget=BUDGET) as run:
        run.note_reads = True
        cache = run.new_cache()
        for part in ids.tensor_split([PROMPT, PROMPT + 2], 1):
            model(part, **{CACHE: cache}, use_cache=True, **given)
    return run


def made(name: str):
    """In the sizes of a tiny model, with its artefact."""
    return equipped(Case(name).method(), MODEL())


@pytest.mark.parametrize("methods", [[n] for n in READERS] + [["oracle-topk"], ["snapkv", "quest"]], ids="+".join)
def test_every_pair_of_every_layer_is_counted_at_a_position(methods):
    run = read([made(n) for n in methods])
    assert len(run.record.layers) == 2
    for layer in run.record.layers.values():
        assert list(layer.reads) == [0] and layer.readers == {0: REST}
        assert layer.reads[0].shape == (4, PROMPT + REST)
        assert int(layer.reads[0].sum()) == layer.pairs["decode"] and int(layer.reads[0].max()) <= REST
    assert run.record.density("decode") < 1


def test_what_was_dropped_is_never_read_and_what_is_kept_is_found_by_position():
    run = read([made("snapkv"), made("quest")])
    for layer in run.record.layers.values():
        for head, kept in enumerate(layer.kept[0]):
            there = torch.zeros(PROMPT + REST, dtype=torch.bool).index_fill(0, kept.long(), True)
            mine = layer.reads[0][2 * head : 2 * head + 2]
            assert not mine[:, ~there].any() and mine[:, there].any()


def test_rows_are_noted_apart_and_nothing_is_unless_it_is_asked_for():
    both, one = read([made("quest")], 2), read([made("quest")], 1)
    for index, layer in both.record.layers.items():
        assert layer.readers == {0: REST, 1: REST} and not torch.equal(*layer.reads.values())
        assert not one.record.layers[index].reads.keys() - {0}
    with attach(MODEL(), made("quest"), budget=BUDGET) as run, torch.no_grad():
        MODEL()(tokens(PROMPT), use_cache=True)
    assert not run.note_reads and not any(layer.reads for layer in run.record.layers.values())


@settings(max_examples=20, deadline=None)
@given(data=st.data(), rows=st.integers(1, 2), queries=st.integers(1, 3), seen=st.integers(3, 9))
def test_it_is_a_sum_over_the_queries_by_position(data, rows, queries, seen):
    keys = data.draw(st.integers(queries, seen))
    kept = [[sorted(data.draw(st.permutations(range(seen)))[:keys]) for _ in range(2)] for _ in range(rows)]
    shape = data.draw(st.sampled_from([(1, 1), (1, 4), (rows, 4)]))
    allowed = torch.rand(*shape, queries, keys) < 0.5
    selection = Pairs(allowed=allowed, queries=queries, keys=keys)
    record = LayerRecord(0)
    for _ in range(2):
        reading.note(record, range(rows), torch.tensor(kept), 4, selection)
    mask = selection.mask().expand(rows, 4, queries, keys)
    for r in range(rows):
        for h in range(4):
            for j, position in enumerate(kept[r][h // 2]):
                assert int(record.reads[r][h, position]) == 2 * int(mask[r, h, :, j].sum())
        assert record.readers[r] == 2 * queries and int(record.reads[r].sum()) == 2 * int(mask[r].sum())
