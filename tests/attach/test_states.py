"""What is remembered of each sequence: the same as if each were remembered alone, and no more bytes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach.states import Remembered, owned

SEQUENCES = 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sequences_are_remembered_as_if_each_were_alone(data):
    made, alone, clock = Remembered(SEQUENCES), [0.0] * SEQUENCES, 0.0
    made.keep(range(SEQUENCES), {"x": torch.zeros(SEQUENCES, 2)})
    for _ in range(data.draw(st.integers(1, 6))):
        some = data.draw(st.lists(st.integers(0, SEQUENCES - 1), min_size=1, max_size=SEQUENCES, unique=True))
        if data.draw(st.booleans()):
            values = [clock := clock + 1.0 for _ in some]
            made.keep(some, {"x": torch.tensor(values)[:, None].repeat(1, 2)})
            for i, value in zip(some, values):
                alone[i] = value
        else:
            order = data.draw(st.permutations(range(SEQUENCES))) if data.draw(st.booleans()) else (some * 4)[:SEQUENCES]
            made, alone = made.select(order), [alone[i] for i in order]
        assert made.gather(some)["x"][:, 0].tolist() == [alone[i] for i in some]
        assert sum(x.nbytes for x in made.tensors()) <= SEQUENCES * 8


def test_what_was_left_together_is_handed_on_as_it_is():
    made, x = Remembered(3), torch.arange(3.0)
    made.keep([0, 1, 2], {"x": x})
    assert made.gather([0, 1, 2])["x"] is x and made.select([0, 1, 2]).gather([0, 1, 2])["x"] is x
    assert made.gather([1])["x"].data_ptr() != x[1:].data_ptr()
    assert owned({"x": x[:2]})["x"].untyped_storage().nbytes() == x[:2].nbytes and owned({"x": x})["x"] is x


def test_sequences_that_began_empty_remember_nought():
    made = Remembered(2)
    assert made.gather([0, 1]) == {}
    made.keep([1], {"x": torch.ones(1, 2)})
    assert made.gather([0, 1]) == {}
    made.blank([0])
    assert made.gather([0, 1])["x"].tolist() == [[0, 0], [1, 1]]
