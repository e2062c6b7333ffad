"""Merging by Triton against float64, both ways: no worse than the plain operations in the same precision."""

from __future__ import annotations

import pytest
import torch

from saccade import ops
from saccade.core import rng
from tests.helpers import assert_no_worse
from tests.ops._triton import interpreter, run_in_interpreter
from tests.ops.shapes import drawn


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def given(parts, rows, size, dtype, device="cpu"):
    """Outputs and lse of some parts, which not all rows see, and some rows see none; gradients for both results."""
    made = torch.randn(parts + 1, 1, 2, rows, size, generator=rng.generator("merged", rows)).to(dtype)
    lses = 3 * torch.randn(parts + 1, 1, 2, rows, generator=rng.generator("lses", rows))
    lses[:-1].masked_fill_(drawn((parts, 1, 2, rows), 0, 2, rows) == 0, -torch.inf)
    return [x.to(device) for x in (made[:-1], lses[:-1], made[-1], lses[-1])]


def results(merge, outs, lses, d_out, d_lse):
    """out, lse, and the gradients of the parts."""
    outs, lses = (x.detach().clone().requires_grad_() for x in (outs, lses))
    out, lse = merge(list(outs), list(lses))
    d_lse = torch.where(lse > -torch.inf, d_lse, 0.0)
    return [x.detach() for x in (out, lse, *torch.autograd.grad((out, lse), (outs, lses), (d_out, d_lse)))]


def check(merge, parts, rows, size, dtype, device="cpu"):
    """Values and gradients."""
    tensors = given(parts, rows, size, dtype, device)
    exact = results(ops.merge_lse, *[x.double() for x in tensors])
    plain = results(ops.merge_lse, *(x.cpu() for x in tensors))
    mine = results(merge, *tensors)
    for name, ours, truth, theirs in zip(("out", "lse", "d_outs", "d_lses"), mine, exact, plain):
        assert ours.dtype == theirs.dtype
        assert_no_worse(ours.cpu(), truth.cpu(), [theirs], name)


@interpreter
@pytest.mark.parametrize("parts, rows, size", [(2, 40, 16), (5, 33, 20), (1, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradients(parts, rows, size, dtype):
    from saccade.ops.merge_lse import triton as kernels

    check(kernels.merge_lse, parts, rows, size, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(size, dtype):
    for parts in (2, 3, 11):
        check(ops.merge_lse, parts, 300, size, dtype, "cuda")
