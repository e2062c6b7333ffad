"""A record's shares are those of its lists, whatever the lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.core.record import Record

# per layer: bytes held, and per row (seen, tokens kept by each of two heads)
ROW = st.integers(1, 50).flatmap(lambda n: st.tuples(st.just(n), st.tuples(st.integers(0, n), st.integers(0, n))))
LAYERS = st.dictionaries(
    st.integers(0, 9), st.tuples(st.integers(0, 999), st.lists(ROW, min_size=1, max_size=3)), max_size=3
)


def filled(layers) -> Record:
    record = Record()
    for index, (held, rows) in layers.items():
        layer = record.layer(index)
        layer.bytes_held, layer.seen = held, [n for n, _ in rows]
        layer.bytes_host, layer.keys_visited, layer.keys_searched = held // 2, held, 1000
        layer.kept = [[torch.arange(m) for m in heads] for _, heads in rows]
        layer.pairs["prefill"], layer.pairs_causal["prefill"] = held, 1000
        layer.back_ends.add(f"attend:{index % 2}")
    return record


@given(LAYERS)
def test_totals_are_sums_over_layers(layers):
    record = filled(layers)
    assert record.bytes_held == sum(held for held, _ in layers.values())
    assert record.bytes_host == sum(held // 2 for held, _ in layers.values())
    assert record.visited_fraction == (record.bytes_held / (1000 * len(layers)) if layers else 1.0)
    assert record.density() == (record.bytes_held / (1000 * len(layers)) if layers else 1.0)
    assert record.density("decode") == 1.0, "what did not happen left nothing out"
    shares = [sum(sum(k) for _, k in rows) / sum(2 * n for n, _ in rows) for _, rows in layers.values()]
    assert record.kept_fraction == pytest.approx(sum(shares) / len(shares) if shares else 1.0)
    assert record.back_ends == sorted({f"attend:{i % 2}" for i in layers})


@given(LAYERS)
def test_the_table_has_a_row_for_each_layer(layers):
    rows = filled(layers).table()
    assert [row["layer"] for row in rows] == sorted(layers)
    for row in rows:
        held, lengths = layers[row["layer"]]
        assert row["bytes_held"] == held and row["seen"] == max(n for n, _ in lengths)
        assert row["prefill_density"] == held / 1000 and row["decode_density"] == 1.0


def test_a_layer_is_made_once():
    record = Record()
    assert record.layer(3) is record.layer(3) and list(record.layers) == [3]
