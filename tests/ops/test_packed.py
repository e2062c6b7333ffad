"""Packed tokens: their formula in plain loops, units one behind the other, and attention over what they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend

from saccade import ops
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.ops.packed import api
from tests.helpers import assert_close_as_torch, assert_no_worse, exact_attention, torch_attention
from tests.ops._triton import interpreter, run_in_interpreter
from tests.ops.shapes import HEAD_SIZES, tensors

BITS = st.sampled_from([2, 4])
few = settings(max_examples=15, deadline=None)


def nearest(x, bits):
    """One group: every number as the nearest of 2^bits equally far steps from the least to the largest."""
    low, high = float(x.min()), float(x.max())
    step = (high - low) / (2**bits - 1)
    return x if step == 0 else ((x - low) / step).round() * step + low


def rounded(k, v, bits):
    """[t d] of one row, one channel of keys and one token of values after the other."""
    k, scale = k.clone(), v.abs().amax(0).sqrt()
    scale[scale == 0] = 1
    for c in range(k.shape[1]):
        k[:, c] = nearest(k[:, c].clone(), bits)
    return k, torch.stack([nearest(token, bits) for token in v / scale]) * scale


def noise(rows, tokens, size, dtype=torch.float64):
    _, k, v = tensors(rows, 1, 1, 1, tokens, size, torch.float64)
    return k[:, 0].to(dtype), v[:, 0].to(dtype)


def joined(*units):
    return ops.Packed(**{name: torch.cat([vars(x)[name] for x in units], 1) for name in vars(units[0])})


@few
@given(BITS, st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum), st.sampled_from([4, 16]))
def test_units_stand_for_what_the_formula_says(bits, lengths, size):
    every = [noise(2, n, size) for n in lengths]
    every[0][1][..., 0] = 0.0
    packed = joined(*[ops.pack_tokens(k, v, bits) for k, v in every])
    assert packed.bits == bits and packed.size == size
    assert packed.keys.shape == packed.values.shape == (2, sum(lengths), size * bits // 8)
    assert packed.tokens.tolist() == [[n for n in lengths if n]] * 2
    k, v = ops.unpack_tokens(packed)
    for row in range(2):
        exact = [rounded(k[row], v[row], bits) for k, v in every if k.shape[1]]
        torch.testing.assert_close(k[row], torch.cat([x for x, _ in exact]))
        torch.testing.assert_close(v[row], torch.cat([x for _, x in exact]))
    some = ops.unpack_tokens(packed, 1, sum(lengths))
    assert torch.equal(some[0], k[:, 1:]) and torch.equal(some[1], v[:, 1:])


@few
@given(BITS, st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_no_number_is_farther_than_half_a_step(bits, tokens, dtype):
    k, v = noise(2, tokens, 16, dtype)
    packed = ops.pack_tokens(k, v, bits)
    (k_found, v_found), eps = ops.unpack_tokens(packed), torch.finfo(dtype).eps
    assert k_found.dtype == v_found.dtype == dtype
    wide = packed.key_span[..., 1].double()  # what is stored, divided and multiplied is rounded as well
    assert ((k_found.double() - k.double()).abs() <= wide / 2 + eps * (2**bits * wide + k.double().abs().max())).all()
    scale = packed.value_scale.double()
    wide = packed.value_span[..., 1:].double() * scale
    most = wide / 2 + 2 * eps * (2**bits * wide + scale * packed.value_span.double().abs().max() + v.double().abs())
    assert ((v_found.double() - v.double()).abs() <= most).all()


@few
@given(BITS, st.integers(1, 30), st.integers(1, 50), st.sampled_from([None, 5.0]))
def test_attention_is_that_over_what_they_stand_for(bits, queries, tokens, softcap):
    q = tensors(2, 2, 1, queries, queries, 16)[0]
    packed = joined(*[ops.pack_tokens(*noise(2, n, 16, torch.float32), bits) for n in (tokens, 3)])
    k, v = (x[:, None] for x in ops.unpack_tokens(packed))
    out, lse = ops.attend_packed(q, packed, softcap=softcap)
    assert_close_as_torch(out, q, k, v, None, softcap=softcap, lse=lse)


def assert_no_worse_than_spelt_out(found, q, packed, softcap):
    """The truth is what the codes stand for, unrounded; PyTorch gets it spelt out in the precision of the queries."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in vars(packed).items()}
    k, v = (x[:, None] for x in ops.unpack_tokens(ops.Packed(**wide)))
    exact = exact_attention(q, k, v, softcap=softcap)
    theirs = torch_attention(q, k.to(q.dtype), v.to(q.dtype), softcap=softcap, backend=SDPBackend.MATH)
    for ours, truth, plain, what in zip(found, exact, theirs, ("output", "lse")):
        assert_no_worse(ours, truth, [plain], what)


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@interpreter
@settings(max_examples=4, deadline=None)
@given(
    BITS, st.integers(1, 9), st.lists(st.integers(1, 90), min_size=1, max_size=2), st.sampled_from([None, 5.0]),
    st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([16, 20]),
)  # fmt: skip
def test_attention_from_the_codes(bits, queries, lengths, softcap, dtype, size):
    q, said = tensors(2, 3, 1, queries, queries, size, dtype)[0], []
    packed = joined(*[ops.pack_tokens(*noise(2, n, size, dtype), bits) for n in lengths])
    found = ops.attend_packed(q, packed, softcap=softcap, impl="triton", report=said.append)
    assert said == ["attend_packed:triton"] and found[0].dtype == dtype
    assert_no_worse_than_spelt_out(found, q, packed, softcap)


@interpreter
def test_rows_whose_units_differ_and_what_it_cannot_read():
    one, other = ([ops.pack_tokens(*noise(1, n, 16, torch.float16), 2) for n in some] for some in ((70, 9), (31, 48)))
    packed = ops.Packed(**{name: torch.cat([vars(joined(*x))[name] for x in (one, other)]) for name in vars(one[0])})
    q = tensors(2, 2, 1, 1, 1, 16, torch.float16)[0]
    assert_no_worse_than_spelt_out(ops.attend_packed(q, packed, impl="triton"), q, packed, None)
    with pytest.raises(CannotRun, match=r"(?s)takes float16 or b.*130 queries of a row; it takes up to 64"):
        ops.attend_packed(q.double().repeat(1, 1, 65, 1), packed, impl="triton")


def test_they_are_spelt_out_in_pieces(monkeypatch):
    q = tensors(2, 2, 1, 3, 3, 16, torch.float64)[0]
    packed = joined(*[ops.pack_tokens(*noise(2, n, 16), 4) for n in (20, 7)])
    whole = ops.attend_packed(q, packed)
    monkeypatch.setattr(api, "PIECE", 6)
    for one, other in zip(ops.attend_packed(q, packed), whole):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_packed_says_why():
    k, v = noise(1, 3, 6)
    with pytest.raises(BadOption, match=r"pack tokens in 8 bits: there are 2 and 4\. Give one of those"):
        ops.pack_tokens(k, v, 8)
    with pytest.raises(BadInput, match=r"pack heads of 6 in 2 bits: 4 channels share a byte\. Pad to 8"):
        ops.pack_tokens(k, v, 2)
    q, none = torch.zeros(1, 2, 1, 6, dtype=k.dtype), ops.pack_tokens(k[:, :0], v[:, :0], 4)
    with pytest.raises(BadInput, match=r"over 0 packed tokens of 1 heads of 6: .* a token to read"):
        ops.attend_packed(q, none)
    with pytest.raises(BadInput, match=r"attention of \(2, 2, 1, 6\) over 3 packed tokens of 1 heads"):
        ops.attend_packed(q.repeat(2, 1, 1, 1), ops.pack_tokens(k, v, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("bits", [2, 4])
def test_attention_from_the_codes_on_a_gpu(bits, size, dtype):
    for queries, lengths, softcap in ((1, (3001, 100, 73), None), (3, (900,), 5.0)):
        q, said = tensors(4, 4, 1, queries, queries, size, dtype)[0].cuda(), []
        units = [[x.cuda() for x in noise(4, n, size, dtype)] for n in lengths]
        packed = joined(*[ops.pack_tokens(k, v, bits) for k, v in units])
        found = ops.attend_packed(q, packed, softcap=softcap, report=said.append)
        assert said == ["attend_packed:triton"]
        assert_no_worse_than_spelt_out(found, q, packed, softcap)
