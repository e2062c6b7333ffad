"""Votes of the window: what is beyond the listing that test_snapkv compares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.errors import BadInput


@given(st.integers(1, 20), st.integers(1, 6), st.data())
def test_the_window_has_sure_keys_and_lost_ones_and_no_votes(keys, window, data):
    window = min(keys, window)
    last = data.draw(st.integers(0, window))
    draw = rng.generator("window-votes", 0, keys, window)
    q, k = (torch.randn(2, *s, 8, generator=draw) for s in ((4, window), (2, keys)))
    found = ops.window_votes(q, k, last=last)
    assert (found[..., keys - last :] == torch.inf).all()
    assert (found[..., keys - window : keys - last] == -torch.inf).all()
    assert ((found[..., : keys - window] > 0) & (found[..., : keys - window] <= window)).all()


@pytest.mark.parametrize("wrong", [{"pool_tokens": 4, "last": 1}, {"last": 3}, {"last": -1}])
def test_what_cannot_be_voted_is_refused(wrong):
    with pytest.raises(BadInput, match=r"votes of 2 queries, pool_tokens=\d, last=-?\d: a pool has a middle, and what"):
        ops.window_votes(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 9, 8), **wrong)
