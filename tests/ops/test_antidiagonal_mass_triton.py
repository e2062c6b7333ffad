"""antidiagonal_mass by Triton against float64: in its interpreter, and on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from saccade import ops
from saccade.core.errors import CannotRun
from saccade.ops.antidiagonal_mass.reference import of_logits
from tests.helpers import TURNS, assert_no_worse
from tests.ops._triton import interpreter, run_in_interpreter
from tests.ops.shapes import HEAD_SIZES, tensors

DTYPES = (torch.bfloat16, torch.float16)


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def own(q: Tensor, k: Tensor, turn: int, block: int, stride: int, softcap: float | None) -> Tensor:
    """By PyTorch: one product in the precision of q, the head axis turned; the rest in float32 or better."""
    q, k = (pad(x.roll(turn, -1), (0, 0, 0, -x.shape[2] % stride)).unflatten(2, (-1, stride)) for x in (q, k))
    columns = k.flip(-2).flatten(-2).repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q.flatten(-2) @ columns.mT).to(torch.promote_types(q.dtype, torch.float32))
    return logits * (q.shape[-1] ** -0.5 / stride)


def check(q: Tensor, k: Tensor, block: int, stride: int, softcap: float | None, ours: Tensor | None = None) -> None:
    """Shares are as right as PyTorch's."""
    options = {"block": block, "stride": stride, "softcap": softcap}
    exact = ops.antidiagonal_mass(q.double(), k.double(), **options)
    theirs = [of_logits(own(q, k, t, **options), q.shape[2], k.shape[2], **options) for t in TURNS]
    said = []
    if ours is None:
        ours = ops.antidiagonal_mass(q, k, **options, impl="triton", report=said.append)
        assert said == ["antidiagonal_mass:triton"]
    assert ours.dtype == torch.float32
    assert_no_worse(ours, exact, theirs, "shares")


@interpreter
@settings(max_examples=3)
@example(64, 64, (1, 4), torch.bfloat16, None, 16, (2**30, 1))  # four bands at once
@example(61, 50, (2, 8), torch.float16, 1.5, 24, (1, 1))  # two, one after the other
@given(
    st.integers(1, 48),
    st.integers(1, 48),
    st.sampled_from([(1, 4), (2, 8), (3, 1), (4, 2)]),
    st.sampled_from(DTYPES),
    st.sampled_from([None, 1.5]),
    st.sampled_from([16, 24]),
    st.sampled_from([(1, 1), (1, 4), (2**30, 1)]),
)
def test_shares_of_small_tiles(keys, queries, shape, dtype, softcap, size, memory):
    """Many of them, all at once or as few as can be, ragged everywhere."""
    from saccade.ops.antidiagonal_mass import triton as kernels

    q, k, _ = tensors(1, 4, 2, min(queries, keys), keys, size, dtype)
    (stride, each), how = shape, kernels.Plan(16, 16, 16, 4, 2, *memory)
    block = {"block": stride * each, "stride": stride, "softcap": softcap}
    check(q, k, **block, ours=kernels.antidiagonal_mass(q, k, **block, scale=size**-0.5, how=how))


@interpreter
@pytest.mark.parametrize("block, stride", [(128, 8), (128, 1)])
def test_shares_of_the_tiles_that_are_used(block, stride):
    """Of keys that lie apart, with memory beside them that must not be read."""
    q, k, _ = tensors(1, 2, 1, 200, 300, 80, torch.bfloat16)
    room = torch.full((1, 400, 1, 96), torch.nan, dtype=torch.bfloat16)
    room[:, :300, :, :80] = k.transpose(1, 2)
    check(q.transpose(1, 2).contiguous().transpose(1, 2), room[:, :300, :, :80].transpose(1, 2), block, stride, None)


@interpreter
def test_what_it_cannot_run_says_why():
    q, k, _ = tensors(1, 2, 1, 9, 9, 16)
    with pytest.raises(CannotRun, match="it multiplies 16-bit floats, and the inputs are float32"):
        ops.antidiagonal_mass(q, k, block=4, stride=2, impl="triton")
    q, k = q.half(), k.half()
    for block in (3, 256):
        with pytest.raises(CannotRun, match=f"blocks of {block} strides; it takes powers of two up to 128"):
            ops.antidiagonal_mass(q, k, block=block, stride=1, impl="triton")
    with pytest.raises(CannotRun, match="there is nothing to read"):
        ops.antidiagonal_mass(q[:0], k[:0], block=4, stride=2, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_values_on_a_gpu(size, dtype):
    for queries, keys, block, stride, softcap in (
        (8192, 8192, 128, 8, None), (5003, 9001, 128, 16, 5.0), (3001, 3001, 64, 4, None), (700, 1300, 128, 1, None),
        (1, 777, 16, 8, None), (2000, 2000, 96, 48, None),
    ):  # fmt: skip
        q, k, _ = (x.cuda() for x in tensors(1, 8, 2, queries, keys, size, dtype))
        check(q, k, block, stride, softcap)


@pytest.mark.gpu
def test_rows_of_a_long_context_on_a_gpu():
    """Some rows of blocks at a time, as the workspace goes, of 32 heads over 64k; some are held against float64."""
    q, k, _ = (x.cuda() for x in tensors(1, 32, 8, 2**16, 2**16, 128, torch.bfloat16))
    ours = ops.antidiagonal_mass(q, k, block=128, stride=8, impl="triton")
    torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))
    for end in (512, 2**14, 2**16):
        first, heads = end - 512, slice(8, 12)
        some = ours[:, heads, first // 128 : end // 128, : end // 128]
        check(q[:, heads, first:end], k[:, 2:3, :end], 128, 8, None, some)
