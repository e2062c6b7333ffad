"""quantise and decoding over quantised caches: by the meaning of both, and by Triton."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput, BadOption, CannotRun
from tests.helpers import assert_close_as_torch
from tests.ops._triton import assert_close_on_a_gpu, interpreter, run_in_interpreter
from tests.ops.shapes import HEAD_SIZES, tensors
from tests.ops.test_decode_triton import lists, mask_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@given(st.sampled_from([8, 4]), st.sampled_from(DTYPES), st.sampled_from([4, 32, 80]), st.integers(1, 20))
def test_codes_are_the_nearest_there_are(bits, dtype, size, keys):
    _, k, _ = tensors(2, 2, 2, 1, keys, size, dtype)
    k[0, 0, 0] = 0
    small = ops.quantise(k, bits)
    assert small.shape == k.shape and small.bits == bits and small.bytes == k.numel() * bits // 8 + small.scale.nbytes
    assert small.scale.dtype == dtype
    back = ops.dequantise(small, torch.float64)
    step = small.scale.double()[..., None]
    # the scale as stored may be a rounding too small for the largest value of a token
    most = 0.5 * step + k.double().abs().amax(-1, keepdim=True) * torch.finfo(dtype).eps
    assert ((back - k.double()).abs() <= most).all()
    assert not back[0, 0, 0].any()


@given(st.sampled_from([2, 4]), st.sampled_from([*DTYPES, torch.float64]), st.integers(1, 40), st.integers(1, 9))
def test_codes_of_groups_are_the_nearest_there_are(bits, dtype, size, groups):
    x = tensors(1, 1, 1, 1, groups, size, torch.float64)[1][0, 0].to(dtype)
    x[0] = 3.0
    codes, span = ops.quantise_groups(x, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (groups, -(-size * bits // 8))
    assert span.dtype == dtype and span.shape == (groups, 2)
    back = ops.dequantise_groups(codes, span, bits, size)
    assert back.dtype == dtype and torch.equal(back[0], x[0])
    step = span[:, 1:].double()
    # a step as stored may be a rounding too small for all steps of a group, and what they stand for is rounded again
    most = 0.5 * step + (2**bits * step + x.double().abs().amax(-1, keepdim=True)) * torch.finfo(dtype).eps
    assert ((back.double() - x.double()).abs() <= most).all()


def test_groups_lie_where_they_are_said_to():
    x = torch.tensor([[-1.0, 0.0, 1.0, 2.0, 2.0]])
    codes, span = ops.quantise_groups(x, 2)
    assert codes.tolist() == [[0 + 4 * 1 + 16 * 2 + 64 * 3, 3]] and span.tolist() == [[-1.0, 1.0]]
    assert torch.equal(ops.dequantise_groups(codes, span, 2, 5), x)
    assert ops.quantise_groups(torch.tensor([[15.0, 0.0, 1.0]]), 4)[0].tolist() == [[15, 1]]
    with pytest.raises(BadOption, match=r"quantise groups to 8 bits: there are 2 and 4\. Give one of those"):
        ops.quantise_groups(x, 8)


def test_four_bits_lie_where_they_are_said_to():
    x = torch.tensor([[[[7.0, -7.0, 1.0, 0.0]]]])
    assert ops.quantise(x, 4).codes.flatten().tolist() == [15 + 16 * 9, 1 + 16 * 8]
    assert torch.equal(ops.dequantise(ops.quantise(x, 4)), x)


@interpreter
@settings(max_examples=10)
@given(
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from(DTYPES[1:]),
    st.sampled_from([8, 4]),
    st.sampled_from([None, 2, 4]),
    st.sampled_from([1, 16]),
    st.sampled_from([None, 5.0]),
)
def test_decode_is_attention_over_what_the_codes_stand_for(keys, queries, dtype, bits, heads, page, softcap):
    queries = min(queries, keys)
    q, k, v = tensors(2, 4, 2, queries, keys, 32, dtype)
    index = None if heads is None else lists(2, heads, queries, -(-keys // page))
    _check(q, ops.quantise(k, bits), ops.quantise(v, bits), index, page, softcap, "triton")


def _check(q, k, v, index, page, softcap, impl):
    spelt_out = [ops.dequantise(x, q.dtype) for x in (k, v)]
    said = []
    out, lse = ops.decode(q, k, v, index, page_tokens=page, softcap=softcap, impl=impl, report=said.append)
    assert said == ["decode:triton"] and out.dtype == q.dtype
    mask = mask_of(index if index is None else index.cpu(), q.shape[1], q.shape[2], k.shape[2], page)
    mask = mask.expand(*q.shape[:2], -1, -1).to(q.device)
    same = assert_close_on_a_gpu if q.is_cuda else assert_close_as_torch
    same(out, q, *spelt_out, mask, softcap=softcap, lse=lse)


@interpreter
@pytest.mark.parametrize("size", [16, 80, 128])
def test_head_sizes(size):
    for bits in (8, 4):
        q, k, v = tensors(1, 4, 2, 2, 40, size, torch.float16)
        _check(q, ops.quantise(k, bits), ops.quantise(v, bits), lists(1, 2, 2, 40), 1, None, "triton")


def test_plain_torch_spells_the_codes_out():
    q, k, v = tensors(1, 4, 2, 2, 40, 32)
    small = [ops.quantise(x, 8) for x in (k, v)]
    for impl in ("auto", "torch", "reference"):
        out, lse = ops.decode(q, *small, impl=impl)
        assert_close_as_torch(out, q, *map(ops.dequantise, small), mask_of(None, 4, 2, 40), lse=lse)


def test_what_does_not_fit_is_refused():
    q, k, v = tensors(1, 4, 2, 2, 40, 32)
    with pytest.raises(BadOption, match="quantise to 3 bits"):
        ops.quantise(k, 3)
    with pytest.raises(BadInput, match="quantise heads of 30 to 4 bits"):
        ops.quantise(k[..., :30], 4)
    with pytest.raises(BadInput, match="not quantised to the same number of bits"):
        ops.decode(q, ops.quantise(k, 8), ops.quantise(v, 4))


@interpreter
def test_what_triton_cannot_read_says_why():
    q, k, v = tensors(1, 4, 2, 2, 40, 32)
    seen = torch.ones(1, 1, 2, 40, dtype=torch.bool)
    with pytest.raises(CannotRun) as error:
        ops.decode(q, ops.quantise(k, 8), ops.quantise(v, 8), visible=seen, impl="triton")
    for why in ("a mask over a quantised cache is read by plain torch only", "too coarse for queries in float32"):
        assert why in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("bits", [8, 4])
def test_values_on_a_gpu(size, dtype, bits):
    for queries, keys, heads, page, softcap in (
        (1, 3001, None, 1, None),
        (3, 900, None, 1, 5.0),
        (2, 2000, 2, 16, None),
    ):
        q, k, v = (x.cuda() for x in tensors(2, 8, 2, queries, keys, size, dtype))
        index = None if heads is None else lists(2, heads, queries, -(-keys // page)).cuda()
        _check(q, ops.quantise(k, bits), ops.quantise(v, bits), index, page, softcap, "auto")
