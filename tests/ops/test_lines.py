"""As many columns and diagonals as a number of pairs pays for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.selection import Lines
from saccade.ops.lines.api import _paid


def _ranked(keys: int, heads: int, name: str) -> torch.Tensor:
    """A ranking of columns or diagonals, for each head."""
    score = torch.rand(1, heads, keys, generator=rng.generator("tests/lines", name, keys))
    return score.argsort(dim=-1, descending=True)


@settings(max_examples=40, deadline=None)
@given(keys=st.integers(3, 200), part=st.floats(0.01, 1), share=st.floats(0.01, 0.9), block=st.sampled_from([1, 4, 64]))
def test_what_diagonals_cost_is_what_is_computed(keys, part, share, block):
    queries = max(1, round(part * keys))
    slashes = _ranked(keys, 3, "slashes")[..., : max(1, round(share * keys))].int()
    lines = Lines(verticals=slashes[..., :0], slashes=slashes, block=block, queries=queries, keys=keys)
    assert torch.equal(_paid(lines)[0], lines.count().double().expand(1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("keys, queries, block", [(700, 700, 64), (1500, 900, 128), (4096, 4096, 16)])
def test_a_gpu_draws_the_same_lines(keys, queries, block):
    sizes = torch.tensor([[100.0, 600.0], [500.0, 50.0], [10.0, 10.0]])
    ranked = [_ranked(keys, 3, name) for name in ("columns", "slashes")]
    shape = {"row_tokens": keys // 4, "block": block, "queries": queries}
    here = ops.fit_lines(*ranked, sizes, **shape)
    there = ops.fit_lines(*(x.cuda() for x in ranked), sizes.cuda(), **shape)
    for name in ("verticals", "slashes"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
