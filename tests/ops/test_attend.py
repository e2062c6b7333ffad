"""attend over every kind of selection, against float64 under `selection.mask()`; errors by their texts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.selection import Pairs, Selection, dense
from tests.helpers import (
    KERNELS,
    TURNS,
    assert_close_as_torch,
    assert_no_worse,
    assert_within,
    error,
    exact_attention,
    rounding,
    torch_attention,
)
from tests.ops.shapes import HEAD_SIZES, KINDS, build, selections, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(attention, inputs, selection: Selection, with_lse: bool):
    """of sum(weights * out) (+ sum of the finite lse)."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = attention(*inputs)
    weights = torch.randn(out.shape, generator=rng.generator("weights", 0, *out.shape))
    total = (out * weights.to(out.dtype)).sum()
    if with_lse:
        total = total + torch.where(selection.mask().any(-1), lse, 0.0).sum().to(total.dtype)
    return torch.autograd.grad(total, inputs)


@given(selections(), st.sampled_from(DTYPES), st.sampled_from([None, 5.0]), st.sampled_from([None, 0.3]))
def test_forward_is_as_right_as_torch(case, dtype, softcap, scale):
    b, h, g, selection = case
    q, k, v = tensors(b, h, g, selection.queries, selection.keys, 32, dtype)
    out, lse = ops.attend(q, k, v, selection, softcap=softcap, scale=scale)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close_as_torch(out, q, k, v, selection.mask(), softcap=softcap, scale=scale, lse=lse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_both_ways_at_every_head_size(kind, size, softcap):
    selection = build(kind, 1, 4, 150, 190, True, 3, 64)
    inputs = tensors(1, 4, 2, selection.queries, selection.keys, size)
    out, lse = ops.attend(*inputs, selection, softcap=softcap)
    assert_close_as_torch(out, *inputs, selection.mask(), softcap=softcap, lse=lse)
    _same_gradients(inputs, selection, softcap, True)


@given(selections(120, least=8), st.booleans())
def test_gradients_are_as_right_as_torch(case, with_lse):
    b, h, g, selection = case
    _same_gradients(tensors(b, h, g, selection.queries, selection.keys, 32), selection, None, with_lse)


def _same_gradients(inputs, selection, softcap, with_lse):
    ours = gradients(lambda *x: ops.attend(*x, selection, softcap=softcap), inputs, selection, with_lse)
    exact, bounds = _torch_gradients(inputs, selection, selection.mask(), softcap, with_lse)
    _, free = _torch_gradients(inputs, selection, torch.ones_like(selection.mask()), softcap, with_lse)
    for name, a, e, *theirs in zip("qkv", ours, exact, bounds, free):
        assert_within(a, e, max(theirs), f"d{name}")


def _torch_gradients(inputs, selection, mask, softcap, with_lse):
    """Exact gradients, and the largest error of PyTorch's kernels for each."""
    whole = [x.double() for x in inputs]
    exact = gradients(lambda *x: exact_attention(*x, mask, softcap=softcap), whole, selection, with_lse)
    blank = mask.any(-1, keepdim=True)  # PyTorch's gradient is NaN where a row sees nothing: it may see all
    bounds = [rounding(e, torch.float32) for e in exact]
    for backend, turn in itertools.product(KERNELS, TURNS):

        def theirs(q, k, v, backend=backend, turn=turn):
            q, k = q.roll(turn, -1), k.roll(turn, -1)
            out, lse = torch_attention(q, k, v, mask | ~blank, softcap=softcap, backend=backend)
            return out * blank, torch.where(blank[..., 0], lse, 0.0)

        found = gradients(theirs, inputs, selection, with_lse)
        bounds = [max(b, error(f, e)) for b, f, e in zip(bounds, found, exact)]
    return exact, bounds


@given(selections())
def test_back_ends_agree_and_say_their_name(case):
    b, h, g, selection = case
    q, k, v = tensors(b, h, g, selection.queries, selection.keys, 32)
    said = []
    for impl in ("auto", "torch", "reference"):
        out, lse = ops.attend(q, k, v, selection, impl=impl, report=said.append)
        assert_close_as_torch(out, q, k, v, selection.mask(), lse=lse)
    assert said == ["attend:torch", "attend:torch", "attend:reference"]


@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_memory_and_strided_inputs_change_nothing(kind, monkeypatch):
    selection = build(kind, 1, 4, 100, 130, True, 5, 16)
    q, k, v = tensors(2, 4, 2, selection.queries, selection.keys, 32)
    expected = ops.attend(q, k, v, selection)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: _poisoned(real(*s, **o)))
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *s, **o: _poisoned(new(x, *s, **o)))
    layouts = (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.stack([x, x], -1)[..., 0])
    for strided in layouts:
        out, lse = ops.attend(strided(q), strided(k), strided(v), selection)
        assert_close_as_torch(out, q, k, v, selection.mask(), lse=lse)
    assert torch.equal(ops.attend(q, k, v, selection)[0], expected[0])


def _poisoned(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x


def test_threads_compute_the_same_and_leave_the_number_of_threads_alone():
    selection = build("blocks", 1, 4, 4200, 4200, True, 0, 64)
    q, k, v = tensors(1, 4, 2, 4200, 4200, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.attend(q, k, v, selection)
        torch.set_num_threads(2)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                two = ops.attend(q, k, v, selection)
            assert all(torch.equal(a, b) for a, b in zip(one, two))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_double_precision_is_kept():
    q, k, v = (x.double() for x in tensors(1, 2, 1, 40, 40, 32))
    out, lse = ops.attend(q, k, v, dense(40, 40))
    exact = exact_attention(q, k, v, dense(40, 40).mask())
    assert out.dtype == lse.dtype == torch.float64
    assert_no_worse(out, exact[0], [torch_attention(q, k, v, dense(40, 40).mask())[0]])


ERRORS = {
    "not all [batch, heads, tokens, size]": lambda q, k, v: ops.attend(q[0], k, v, dense(8, 8)),
    "must agree": lambda q, k, v: ops.attend(q, k, v[:, :, :5], dense(8, 8)),
    "the first is not a multiple of the second": lambda q, k, v: ops.attend(q[:, :3], k, v, dense(8, 8)),
    "k torch.float64 on cpu": lambda q, k, v: ops.attend(q, k.double(), v, dense(8, 8)),
    "the selection is for 9 queries over 9 keys": lambda q, k, v: ops.attend(q, k, v, dense(9, 9)),
    "the selection has 1 sequences and 3 heads, the queries 1 and 4": lambda q, k, v: ops.attend(
        q, k, v, Pairs(allowed=torch.ones(1, 3, 8, 8, dtype=torch.bool), queries=8, keys=8)
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_inputs_that_do_not_fit_are_refused(text):
    with pytest.raises(BadInput) as error:
        ERRORS[text](*tensors(1, 4, 2, 8, 8, 32))
    assert text in str(error.value)


def test_back_ends_that_are_not_there_are_refused():
    q, k, v = tensors(1, 4, 2, 8, 8, 32)
    with pytest.raises(BadOption, match="attend with impl='magic': there is no such back end"):
        ops.attend(q, k, v, dense(8, 8), impl="magic")
    with pytest.raises(CannotRun, match="attend with impl='triton': its Triton kernels are not part of this version"):
        ops.attend(q, k, v, dense(8, 8), impl="triton")
