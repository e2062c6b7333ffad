"""Block logits against all logits; by Triton in its interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.errors import CannotRun
from saccade.ops.block_logits import api
from tests.ops._triton import interpreter, run_in_interpreter


def test_in_the_interpreter():
    run_in_interpreter(__file__)


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


@interpreter
@settings(max_examples=10)
@given(
    st.integers(1, 60), st.integers(1, 4), st.integers(1, 20), st.integers(1, 3), st.integers(1, 40),
    st.sampled_from([8, 24, 64]), st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_triton_gives_what_torch_gives(keys, width, rows, groups, count, size, dtype):
    draw = rng.generator("block-logits/triton", 0, keys, width, rows, groups, count, size)
    q, k = (torch.randn(2, *s, generator=draw).to(dtype) for s in ((rows, 4, groups, size), (2, keys, size)))
    q = q.permute(0, 2, 3, 1, 4)
    first = torch.randint(keys, (groups,), generator=draw)
    blocks = torch.randint(keys, (2, 4, groups, count), generator=draw)
    said = []
    found = ops.block_logits(q, k, first, width, blocks, impl="triton", report=said.append)
    assert said == ["block_logits:triton"] and found.dtype == torch.float32
    torch.testing.assert_close(found, ops.block_logits(q, k, first, width, blocks, impl="torch"))


@interpreter
def test_a_nan_stays_one_in_triton():
    q, k = torch.ones(1, 1, 1, 2, 16), torch.ones(1, 1, 4, 16)
    k[0, 0, 3, 5] = torch.nan
    found = ops.block_logits(q, k, torch.zeros(1).long(), 2, torch.tensor([[[[0, 1]]]]), impl="triton")
    assert found[..., 0].item() == 16 and found[..., 1].isnan().all()


@interpreter
def test_what_triton_cannot_run_says_why():
    q, k = (x.double().requires_grad_() for x in (torch.ones(1, 1, 1, 65, 260), torch.ones(1, 1, 4, 260)))
    with pytest.raises(CannotRun) as error:
        ops.block_logits(q, k, torch.zeros(1).long(), 2, torch.zeros(1, 1, 1, 0).long(), impl="triton")
    for why in (
        "it gives no gradient, and an input asks for one: call it under torch.no_grad()",
        "it computes in float32 at most, and the inputs are float64",
        "heads of 260; it takes up to 256",
        "groups of 65 queries; it takes up to 64",
        "there is nothing to read",
    ):
        assert why in str(error.value)
