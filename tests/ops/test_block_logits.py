"""Block logits against all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.ops.block_logits import api


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4))
def test_each_is_the_largest_of_its_block(keys, width, rows, start, groups):
    draw = rng.generator("block-logits", 0, keys, width, rows, start, groups)
    q, k = (torch.randn(2, *s, generator=draw) for s in ((4, groups, rows, 8), (2, keys, 8)))
    first = torch.full((groups,), min(start, keys - 1))
    count = max(1, -(-(keys - int(first[0])) // width))
    blocks = torch.randint(count, (2, 4, groups, 3), generator=draw)
    found = ops.block_logits(q, k, first, width, blocks)
    everything = torch.einsum("bhnrd,bhkd->bhnrk", q, k.repeat_interleave(2, 1)).amax(3)
    for t, b in enumerate(blocks.unbind(-1)):
        places = [(first[:, None, None] + b.permute(2, 0, 1) * width + w).clamp(max=keys - 1) for w in range(width)]
        each = [everything.gather(-1, p.permute(1, 2, 0)[..., None])[..., 0] for p in places]
        torch.testing.assert_close(found[..., t], torch.stack(each).amax(0))


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch):
    draw = rng.generator("block-logits/pieces")
    q, k = (torch.randn(*s, generator=draw) for s in ((1, 4, 9, 3, 8), (1, 2, 30, 8)))
    blocks = torch.randint(15, (1, 4, 9, 6), generator=draw)
    whole = ops.block_logits(q, k, torch.zeros(9).long(), 2, blocks)
    monkeypatch.setattr(api, "SCORES", 1)
    torch.testing.assert_close(ops.block_logits(q, k, torch.zeros(9).long(), 2, blocks), whole)
