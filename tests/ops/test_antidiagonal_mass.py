"""Antidiagonal mass against plain loops and against the reference."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput
from tests.methods.handmade import noise

SHAPES = {
    "n": st.integers(1, 40),
    "queries": st.integers(1, 40),
    "stride": st.sampled_from([1, 2, 4]),
    "times": st.integers(1, 3),
    "softcap": st.sampled_from([None, 1.5]),
}


def tensors(n, queries):
    return noise(2, 4, queries, 8, name="q").double(), noise(2, 2, n, 8, name="k").double()


def by_hand(q, k, block, stride, scale, softcap):
    """Of one head: every group of queries with every group of keys, one pair of tokens at a time."""
    (queries, keys), offset = (len(q), len(k)), len(k) - len(q)
    out = torch.zeros(-(-queries // block), -(-keys // block)).double()
    for row in range(len(out)):
        starts = range(row * block, min((row + 1) * block, queries), stride)
        for t in starts:
            weight = {}
            for u in range(0, keys, stride):
                if u < min(offset + t + stride, keys):
                    pairs = [(t + stride - 1 - i, u + i) for i in range(stride)]
                    s = sum(float(q[a] @ k[c]) for a, c in pairs if a < queries and c < keys) * scale / stride
                    weight[u] = math.exp(s if softcap is None else softcap * math.tanh(s / softcap))
            for u, w in weight.items():
                out[row, u // block] += w / sum(weight.values()) / len(starts)
    return out


@settings(max_examples=12)
@given(**SHAPES)
def test_mass_is_that_of_the_papers_antidiagonals(n, queries, stride, times, softcap):
    queries = min(n, queries)
    q, k = tensors(n, queries)
    options = {"block": times * stride, "stride": stride, "scale": 0.8, "softcap": softcap}
    found = ops.antidiagonal_mass(q, k, **options)
    for head in (0, 3):
        torch.testing.assert_close(found[1, head], by_hand(q[1, head], k[1, head // 2], **options))
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


@settings(max_examples=12)
@given(**SHAPES, tight=st.booleans())
def test_back_ends_agree(n, queries, stride, times, softcap, tight):
    q, k = tensors(n, min(n, queries))
    options = {"block": times * stride, "stride": stride, "softcap": softcap}
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["saccade.ops.antidiagonal_mass.torch"], "LOGITS", 1 if tight else 2**20)
        found = ops.antidiagonal_mass(q, k, **options, report=said.append)
    torch.testing.assert_close(found, ops.antidiagonal_mass(q, k, **options, impl="reference"))
    assert said == ["antidiagonal_mass:torch"]


@pytest.mark.parametrize(("stride", "distance"), [(8, 99), (8, 100), (16, 99), (16, 100), (1, 100)])
def test_an_even_stride_meets_diagonals_at_odd_distances_only(stride, distance):
    q = 30.0 * torch.eye(256)[None, None]  # each query matches the key so far behind it
    mass = ops.antidiagonal_mass(q, q.roll(-distance, 2), block=16, stride=stride, scale=1.0)[0, 0, 8:]
    assert (mass.amax(-1) > 0.4).all() == (stride == 1 or distance % 2 == 1)


def test_what_does_not_fit_is_refused():
    q, k = tensors(8, 8)
    said = r"antidiagonals of 8 queries over {} keys, block={}, stride=4: a block is whole strides"
    with pytest.raises(BadInput, match=said.format(8, 6)):
        ops.antidiagonal_mass(q, k, block=6, stride=4)
    with pytest.raises(BadInput, match=said.format(7, 8)):
        ops.antidiagonal_mass(q, k[:, :, 1:], block=8, stride=4)
