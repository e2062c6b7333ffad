"""What the probe finds out about positions: it turns queries as the model does, or says that it does not know."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach.calibration import Subject
from saccade.attach.probe import probe
from tests.helpers import assert_within, rounding

UNKNOWN = {"gpt-neox": "a part of each head is rotated", "gemma3": "two rotations, for two kinds of layers"}


@pytest.mark.parametrize("family", [f for f in models.FAMILIES if f not in UNKNOWN])
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_a_query_is_turned_to_where_the_model_would_put_it(family, data):
    """A text of one word over and over: its queries differ by their positions alone, in every layer."""
    model = models.tiny(family).double()
    a, b = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 60))
    for (_, q, k, _), spot in zip(Subject(model).capture_qkv([torch.full((1, 61), 7)]), probe(model).sites):
        assert spot.place.turn is not None
        # angles are taken in float32 in any precision, and so are norms: a few roundings beside those of the angles
        angles = rounding(torch.tensor(a + b + abs(b - a) + 8.0), torch.float32)
        for x in (q, k):
            moved = spot.place.turn(x[:, :, a : a + 1], torch.tensor([b - a]))
            assert_within(moved, x[:, :, b : b + 1], angles * float(x.abs().max()))


@pytest.mark.parametrize("family", UNKNOWN)
def test_what_is_not_known_is_said(family):
    assert all(spot.place.turn is None for spot in probe(models.tiny(family)).sites)
