"""page_bounds, page_scores and sparse_step: in plain torch, in Triton's interpreter, on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput, CannotRun
from saccade.core.selection import Gather, causal_mask
from tests.helpers import TURNS, assert_close_as_torch, assert_no_worse
from tests.ops._triton import assert_close_on_a_gpu, interpreter, run_in_interpreter
from tests.ops.shapes import HEAD_SIZES, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def check(keys: int, page: int, queries: int, size: int, dtype: torch.dtype, impl: str, device: str = "cpu") -> None:
    """Bounds are those of each page, token by token; scores are as right as PyTorch's and bound every logit."""
    q, k, _ = (x.to(device) for x in tensors(2, 4, 2, queries, keys, size, dtype))
    low, high = ops.page_bounds(k, page, impl=impl)
    for p in range(-(-keys // page)):
        some = k[:, :, p * page : (p + 1) * page]
        assert torch.equal(low[:, :, p], some.amin(2)) and torch.equal(high[:, :, p], some.amax(2))
    scores = ops.page_scores(q, low, high, impl=impl)
    wide = q[:, :, :, None].float(), *(x.repeat_interleave(2, 1)[:, :, None].float() for x in (low, high))
    exact = torch.maximum(*(wide[0].double() * x.double() for x in wide[1:])).sum(-1)
    theirs = [torch.maximum(*(wide[0].roll(t, -1) * x.roll(t, -1) for x in wide[1:])).sum(-1) for t in TURNS]
    theirs += [_products(*(x.roll(t, -1) for x in (q, low, high))) for t in TURNS]
    assert_no_worse(scores, exact, theirs, "scores")
    together = ops.page_scores(q, low, high, by_group=True, impl=impl)
    assert_no_worse(together, exact.unflatten(1, (2, 2)).amax(2), [t.unflatten(1, (2, 2)).amax(2) for t in theirs])


def _products(q, low, high):
    """The same as PyTorch multiplies in the dtype of the queries."""
    low, high = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (low, high))
    return (q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT).float()


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 3), st.sampled_from(DTYPES))
def test_bounds_and_scores_in_plain_torch(keys, page, queries, dtype):
    check(keys, page, queries, 32, dtype, "torch")


@interpreter
@settings(max_examples=8)
@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 3), st.sampled_from(DTYPES), st.sampled_from([24, 32]))
def test_bounds_and_scores(keys, page, queries, dtype, size):
    check(keys, page, queries, size, dtype, "triton")


@interpreter
def test_strided_keys_and_a_nan():
    _, k, _ = tensors(1, 2, 2, 1, 50, 32)
    room = torch.full((1, 64, 2, 64), torch.nan)
    room[:, :50, :, :32] = k.transpose(1, 2)
    strided = room[:, :50, :, :32].transpose(1, 2)
    for got, want in zip(ops.page_bounds(strided, 16, impl="triton"), ops.page_bounds(k, 16)):
        assert torch.equal(got, want)
    k[0, 0, 20, 3] = torch.nan
    for got, want in zip(ops.page_bounds(k, 16, impl="triton"), ops.page_bounds(k, 16)):
        assert got[0, 0, 1, 3].isnan() and torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0))
    with pytest.raises(CannotRun, match="the inputs are float64"):
        ops.page_bounds(k.double(), 16, impl="triton")


def check_step(keys: int, queries: int, size: int, dtype: torch.dtype, impl: str, device: str = "cpu") -> None:
    """A step is attention over the tokens of the best pages."""
    q, k, v = (x.to(device) for x in tensors(2, 4, 2, queries, keys, size, dtype))
    low, high = ops.page_bounds(k, 8, impl="torch")
    scores = ops.page_scores(q, low, high, by_group=True, impl=impl)
    index = ops.topk(scores, 3, impl="reference").repeat_interleave(2, 1)
    pages = low.shape[2]
    mask = Gather(index=index, queries=queries, keys=queries + pages, causal=False).mask()[..., :pages]
    mask = mask.repeat_interleave(8, -1)[..., :keys] & causal_mask(queries, keys, device)
    for softcap in (None, 5.0):
        options = {"page_tokens": 8, "keep_pages": 3, "softcap": softcap, "impl": impl}
        out, lse = ops.sparse_step(q, k, v, low, high, **options)
        same = assert_close_on_a_gpu if q.is_cuda else assert_close_as_torch
        same(out, q, k, v, mask, softcap=softcap, lse=lse)


@pytest.mark.parametrize("keys, queries", [(70, 1), (20, 3), (64, 2)])
def test_a_step_in_plain_torch(keys, queries):
    check_step(keys, queries, 32, torch.float32, "torch")


@interpreter
@pytest.mark.parametrize("keys, queries", [(70, 1), (20, 3), (64, 2)])
def test_a_step(keys, queries):
    check_step(keys, queries, 32, torch.float32, "triton")


def test_what_does_not_fit_is_refused():
    q, k, v = tensors(1, 4, 2, 1, 40, 32)
    low, high = ops.page_bounds(k, 8)
    with pytest.raises(BadInput, match="pages of 1 key or more"):
        ops.page_bounds(k, 0)
    with pytest.raises(BadInput, match="Give bounds of keys that fit the queries"):
        ops.page_scores(q, low[..., :8], high)
    with pytest.raises(BadInput, match="a step that keeps 3 pages of 16 of keys"):
        ops.sparse_step(q, k, v, low, high, page_tokens=16, keep_pages=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_values_on_a_gpu(size, dtype):
    check(1003, 16, 2, size, dtype, "auto", "cuda")
    check_step(1003, 1, size, dtype, "auto", "cuda")
    check_step(700, 3, size, dtype, "auto", "cuda")


@pytest.mark.gpu
def test_a_step_replays_in_a_graph_on_new_inputs():
    q, k, v = (x.cuda() for x in tensors(1, 8, 2, 1, 9000, 128, torch.bfloat16))
    low, high = ops.page_bounds(k, 16)
    options = {"page_tokens": 16, "keep_pages": 40}
    ops.sparse_step(q, k, v, low, high, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ops.sparse_step(q, k, v, low, high, **options)
    for turn in (1, 2, 3):
        q.copy_(q.roll(turn, -1))
        graph.replay()
        expected, _ = ops.sparse_step(q, k, v, low, high, **options)
        assert torch.equal(out, expected)
        assert not torch.equal(out, ops.sparse_step(q.roll(1, -1), k, v, low, high, **options)[0])
