"""Rows of a tensor at places, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput
from tests.methods.handmade import noise
from tests.ops._triton import interpreter, run_in_interpreter
from tests.ops.shapes import drawn

shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70), st.integers(1, 4), st.integers(0, 9))


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def given_rows(g, n, d, r, length, dtype=torch.float32):
    """A tensor, and places of which some are -1."""
    return noise(g, n, d, name="rows").to(dtype), drawn((g, r, length), -1, n, n).int()


def by_loops(x, place):
    """Row by row."""
    out = torch.zeros(*place.shape, x.shape[2], dtype=x.dtype)
    for head, at in enumerate(place):
        for i, row in enumerate(at):
            for j, p in enumerate(row.tolist()):
                if p >= 0:
                    out[head, i, j] = x[head, p]
    return out


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_rows_are_those_asked_for(shape):
    x, place = given_rows(*shape)
    assert torch.equal(ops.fetch(x, place), by_loops(x, place))


@interpreter
@given(shapes, st.booleans())
@settings(max_examples=15, deadline=None)
def test_by_the_kernel(shape, turned):
    from saccade.ops.fetch import triton as kernel

    x, place = given_rows(*shape)
    given_x = x.mT.contiguous().mT if turned else x
    assert torch.equal(kernel.fetch(given_x, place), by_loops(x, place))


def test_what_does_not_fit_is_said():
    x, place = given_rows(2, 5, 4, 3, 2)
    text = r"fetch rows of \(2, 5, 4\) at \(1, 3, 2\), torch\.int32: they are not \[heads, n, size\] and"
    with pytest.raises(BadInput, match=text):
        ops.fetch(x, place[:1])
    with pytest.raises(BadInput, match=r"torch\.float32.*Give whole numbers per head\."):
        ops.fetch(x, place.float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    """From pinned memory, from the device, and from where no kernel reads."""
    x, place = given_rows(3, 1000, 96, 7, 50, dtype)
    for there in (x.pin_memory(), x.cuda(), x):
        found = ops.fetch(there, place.cuda())
        assert found.is_cuda and torch.equal(found.cpu(), by_loops(x, place))
