"""Linear attention against its double sum; random features against the exponential that they estimate."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.errors import BadInput
from saccade.core.selection import Gather
from saccade.ops.linear_attend import api
from tests.methods.handmade import noise
from tests.mixers import assert_as_good


@settings(max_examples=12)
@given(n=st.integers(1, 40), queries=st.integers(1, 40), chunk=st.sampled_from([3, 16]), causal=st.booleans(),
       lists=st.sampled_from(["none", "long", "short"]))  # fmt: skip
def test_it_is_the_double_sum_and_its_gradients(n, queries, chunk, causal, lists):
    queries = min(n, queries)
    q, k, v = (noise(2, *s).double().requires_grad_() for s in ((4, queries, 5), (2, n, 5), (2, n, 3)))
    without, left = None, torch.ones(2, 4, queries, n, dtype=torch.bool)
    if lists != "none":
        index = torch.argsort(torch.rand(1, 4, queries, n, generator=rng.generator("lists", n)), -1)[..., : n // 2 + 1]
        without = Gather(index=index.int(), queries=queries, keys=n, causal=causal)
        left = ~without.mask().expand_as(left)
    if causal:
        left = left & torch.ones(queries, n, dtype=torch.bool).tril(n - queries)
    with mock.patch.object(api, "CHUNK", chunk), mock.patch.object(api, "SHORTER", 16 if lists == "long" else 0):
        ours = ops.linear_attend(q, k, v, without=without, causal=causal)
    weights = (q @ k.repeat_interleave(2, 1).mT) * left
    for a, b in zip(ours, (weights @ v.repeat_interleave(2, 1), weights.sum(-1))):
        assert_as_good(a, b, "sums")
        for one, other in zip(*(torch.autograd.grad(x.square().sum(), (q, k), retain_graph=True) for x in (a, b))):
            assert_as_good(one, other, "gradients")


@pytest.mark.parametrize("many", [3, 8, 21])
def test_directions_are_orthogonal_in_blocks(many):
    w = ops.orthogonal_directions(many, 8, rng.generator("directions"))
    for block in w.split(8):
        unit = torch.nn.functional.normalize(block, dim=-1)
        assert_as_good(unit @ unit.mT, torch.eye(len(block)).double(), "products")
    lengths = ops.orthogonal_directions(4000, 8, rng.generator("lengths")).square().sum(-1)
    assert abs(float(lengths.mean()) - 8) < 6 * 4 / 4000**0.5  # of chi-squared, whose deviation is 4


def test_products_of_features_estimate_the_exponential():
    x, y = noise(2, 8).double()
    draws = [ops.log_features(torch.stack([x, y]), ops.orthogonal_directions(4, 8, rng.generator("w", i)), 0.5).exp()
             for i in range(400)]  # fmt: skip
    found = torch.stack([a @ b for a, b in draws])
    assert abs(float(found.mean() - torch.exp(0.5 * x @ y))) < 6 * float(found.std()) / 400**0.5


def test_what_does_not_fit_is_refused():
    q, k, v = noise(1, 2, 4, 3), noise(1, 2, 4, 3), noise(1, 2, 4, 2)
    with pytest.raises(BadInput, match=r"q \(1, 2, 4, 3\), k \(1, 2, 4, 2\).*do not fit together"):
        ops.linear_attend(q, v, v)
    lists = Gather(index=torch.zeros(1, 1, 2, 1, dtype=torch.int32), q_block=2, queries=4, keys=4)
    with pytest.raises(BadInput, match="lists for blocks of 2 of 4 queries over 4 keys"):
        ops.linear_attend(q, k, v, without=lists)
    with pytest.raises(BadInput, match="0 directions of size 3: there is nothing to draw"):
        ops.orthogonal_directions(0, 3, rng.generator("none"))
