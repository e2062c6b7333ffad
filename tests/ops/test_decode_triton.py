"""decode by Triton against float64: in Triton's interpreter on a CPU, and on a CUDA device at every head size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput, CannotRun
from saccade.core.selection import Gather, causal_mask
from tests.helpers import assert_close_as_torch
from tests.ops._triton import assert_close_on_a_gpu, interpreter, run_in_interpreter
from tests.ops.shapes import HEAD_SIZES, drawn, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def lists(b: int, heads: int, queries: int, entries: int, least: int = 1, seed: int = 1) -> torch.Tensor:
    """Distinct entries in any order, some of them replaced by -1."""
    index = torch.argsort(drawn((b, heads, queries, entries), 0, 1 << 30, seed), -1)[..., : entries // 3 + least].int()
    return index.masked_fill(drawn(index.shape, 0, 4, seed + 1) == 0, -1)


def mask_of(index: torch.Tensor | None, heads: int, queries: int, keys: int, page: int = 1) -> torch.Tensor:
    """What an index means, pair by pair."""
    if index is None:
        return causal_mask(queries, keys)[None, None]
    if index.shape[1] != 1:
        index = index.repeat_interleave(heads // index.shape[1], 1)
    pages = Gather(index=index, queries=queries, keys=queries + -(-keys // page), causal=False).mask()
    return pages.repeat_interleave(page, -1)[..., :keys] & causal_mask(queries, keys)


@interpreter
@settings(max_examples=12)
@given(
    st.integers(1, 70),
    st.integers(1, 4),
    st.sampled_from(DTYPES),
    st.sampled_from([None, 1, 2, 4]),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
    st.sampled_from([None, 5.0]),
)
def test_decode_is_attention_under_its_mask(keys, queries, dtype, heads, page, narrowed, softcap):
    queries = min(queries, keys)
    q, k, v = tensors(2, 4, 2, queries, keys, 32, dtype)
    index = None if heads is None else lists(1 if heads == 1 else 2, heads, queries, -(-keys // page))
    mask = mask_of(index, 4, queries, keys, page)
    visible = drawn((1, 4, queries, keys), 0, 3, 3) > 0 if narrowed else None
    if narrowed:
        mask = mask & visible
    said = []
    out, lse = ops.decode(
        q, k, v, index, page_tokens=page, visible=visible, softcap=softcap, impl="triton", report=said.append
    )
    assert said == ["decode:triton"] and out.dtype == dtype
    assert_close_as_torch(out, q, k, v, mask.expand(2, 4, -1, -1), softcap=softcap, lse=lse)


@interpreter
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (33, 90)])
def test_more_queries_than_a_tile_takes_read_every_key(queries, keys):
    q, k, v = tensors(2, 4, 2, queries, keys, 32)
    said = []
    out, lse = ops.decode(q, k, v, softcap=5.0, impl="triton", report=said.append)
    mask = causal_mask(queries, keys).expand(2, 4, -1, -1)
    assert said == ["decode:triton"]
    assert_close_as_torch(out, q, k, v, mask, softcap=5.0, lse=lse)


@interpreter
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_head_sizes_and_values_of_another_size(size):
    q, k, v = tensors(1, 4, 2, 2, 50, size, torch.float32 if size <= 128 else torch.float16)
    index = lists(1, 2, 2, 50)
    out, lse = ops.decode(q, k, v, index, impl="triton")
    assert_close_as_torch(out, q, k, v, mask_of(index, 4, 2, 50), lse=lse)
    half, _ = ops.decode(q, k, v[..., : size // 2], index, impl="triton")
    torch.testing.assert_close(half, out[..., : size // 2])


@interpreter
def test_rows_that_see_nothing_give_zeros_and_minus_infinity_and_a_nan_stays():
    q, k, v = tensors(1, 4, 2, 1, 40, 32)
    out, lse = ops.decode(q, k, v, torch.full((1, 2, 1, 30), -1, dtype=torch.int32), impl="triton")
    assert not out.any() and (lse == -torch.inf).all()
    k[0, 0, 3] = torch.nan
    out, lse = ops.decode(q, k, v, impl="triton")
    assert out[:, :2].isnan().all() and lse[:, :2].isnan().all() and out[:, 2:].isfinite().all()


def _poison_and_strides(device: str, size: int):
    """A cache with unwritten room (NaN) behind its keys, laid out in both usual orders, and lists of any strides."""
    q, k, v = (x.to(device) for x in tensors(2, 4, 2, 2, 90, size))
    index = lists(2, 2, 2, 90).to(device)
    expected = ops.decode(q, k, v, index, impl="reference")
    room = torch.full((2, 2, 128, 2 * size), torch.nan, device=device)
    room[:, :, :90, :size], room[:, :, :90, size:] = k, v
    turned = torch.full((2, 128, 2, 2 * size), torch.nan, device=device)
    turned[:, :90] = room[:, :, :90].transpose(1, 2)
    far = torch.stack([index, index], -1)[..., 0]
    for cache in (room, turned.transpose(1, 2)):
        keys, values = cache[:, :, :90, :size], cache[:, :, :90, size:]
        for got, want in zip(ops.decode(q, keys, values, far, impl="triton"), expected):
            torch.testing.assert_close(got, want)
        every = ops.decode(q[:, :, :1], keys, values, impl="triton")[0]
        torch.testing.assert_close(every, ops.decode(q[:, :, :1], k, v, impl="reference")[0])


@interpreter
def test_poisoned_memory_and_strided_inputs_change_nothing():
    _poison_and_strides("cpu", 32)


@pytest.mark.gpu
def test_poisoned_memory_and_strided_inputs_change_nothing_on_a_gpu(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: _poisoned(real(*s, **o)))
    for size in (64, 80, 128):
        _poison_and_strides("cuda", size)


def _poisoned(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_values_on_a_gpu(size, dtype):
    for queries, keys, heads, page, softcap, narrowed in (
        (1, 3000, None, 1, None, False),
        (5, 777, None, 1, 5.0, True),
        (1, 4099, 2, 1, None, False),
        (3, 1500, 8, 1, None, True),
        (2, 2000, 2, 16, 5.0, False),
        (1, 100, 1, 64, None, False),
    ):
        q, k, v = tensors(2, 8, 2, queries, keys, size, dtype)
        index = None if heads is None else lists(2, heads, queries, -(-keys // page))
        mask = mask_of(index, 8, queries, keys, page)
        visible = drawn((1, 8, queries, keys), 0, 3, 3) > 0 if narrowed else None
        mask = mask & visible if narrowed else mask
        there = [x if x is None else x.cuda() for x in (q, k, v, index, visible)]
        said = []
        out, lse = ops.decode(
            *there[:4], page_tokens=page, visible=there[4], softcap=softcap, impl="auto", report=said.append
        )
        assert said == ["decode:torch" if dtype == torch.float32 and size > 128 else "decode:triton"]
        mask = mask.expand(2, 8, -1, -1).cuda()
        assert_close_on_a_gpu(out, *there[:3], mask, softcap=softcap, lse=lse)


def test_pages_and_lists_of_a_group_mean_the_same_in_plain_torch():
    q, k, v = tensors(2, 4, 2, 2, 50, 32)
    index = lists(2, 2, 2, -(-50 // 16))
    for impl in ("torch", "reference"):
        out, lse = ops.decode(q, k, v, index, page_tokens=16, impl=impl)
        assert_close_as_torch(out, q, k, v, mask_of(index, 4, 2, 50, 16), lse=lse)


def test_a_page_of_no_key_is_refused():
    q, k, v = tensors(1, 4, 2, 3, 9, 32)
    with pytest.raises(BadInput, match="a page has one key or more"):
        ops.decode(q, k, v, page_tokens=0)


@interpreter
def test_what_triton_cannot_run_says_why():
    q, k, v = (x.double().requires_grad_() for x in tensors(1, 66, 1, 1, 9, 260))
    with pytest.raises(CannotRun) as error:
        ops.decode(q, k, v, impl="triton")
    for why in (
        "it gives no gradient, and an input asks for one: call it under torch.no_grad()",
        "it computes in float32 at most, and the inputs are float64",
        "heads of 260; it takes up to 256",
        "66 rows share the keys of a head; it takes up to 64",
    ):
        assert why in str(error.value)
