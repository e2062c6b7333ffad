"""The search of a graph by Triton, against that by plain torch: the same keys are followed, met and found."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.ops.nearest import graph as plain
from tests.methods.handmade import noise
from tests.ops._triton import interpreter, run_in_interpreter


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def made(g, n, d, seed, dtype=torch.float32, rows=3, **options):
    """A graph, and queries that it was not built from."""
    keys = noise(g, n, d, name=f"keys {seed}").to(dtype)
    queries = noise(g, 30, d, name=f"queries {seed}") + 1.5
    asking = noise(g, rows, d, name=f"asking {seed}") + 1.5
    return ops.index_keys(keys, queries.to(dtype), "graph", **options), asking.to(dtype)


def check(index, q, count, device="cpu", pin=False, several=True):
    """Equal but for rounding, over the places where no two scores are that near each other."""
    from saccade.ops.nearest import triton as kernel

    most = kernel._wide(index, count) // index.edges.shape[2]
    for together in {min(3, most), most} if several else {most}:
        width = max(index.beam, count)
        head = torch.arange(len(q)).repeat_interleave(q.shape[1])
        want = plain._search(index, plain.wide(q).flatten(0, 1), head, width, together)
        there = index.moved((lambda x: x.pin_memory()) if pin else (lambda x: x.to(device)))
        if pin:
            assert not kernel.reasons(there, q.to(device), count)
        found = kernel.search(there, q.to(device), count, together)
        score = want.score[:, :count].unflatten(0, (len(q), -1))
        torch.testing.assert_close(found.score.cpu(), score, rtol=1e-5, atol=1e-5)
        index_ = want.index[:, :count].unflatten(0, (len(q), -1))
        assert (found.index.cpu() == index_).float().mean() > 0.98, "two may be equal but for rounding"
        assert abs(int(found.visited) - want.visited) <= 0.02 * want.visited


@interpreter
@given(
    st.integers(1, 2), st.integers(60, 300), st.integers(3, 40), st.integers(0, 99),
    st.integers(1, 70), st.integers(1, 20), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_it_finds_what_plain_torch_finds(g, n, d, seed, beam, degree, count, dtype):
    index, q = made(g, n, d, seed, dtype, 1, beam=beam, degree=degree)
    check(index, q, count, several=False)


@interpreter
def test_keys_need_not_lie_one_behind_the_other():
    index, q = made(2, 200, 8, 1, rows=1, beam=20, degree=5)
    apart = dataclasses.replace(index, keys=torch.cat([index.keys, index.keys], -1)[:, :, :8])
    check(apart, q, 10)


@interpreter
def test_many_queries_are_searched_for_in_parts(monkeypatch):
    from saccade.ops.nearest import triton as kernel

    index, q = made(1, 200, 8, 1, rows=2, beam=10, degree=5)
    whole = kernel.search(index, q, 10, 3)
    monkeypatch.setattr(kernel, "NOTES", 200)
    parts = kernel.search(index, q, 10, 3)
    assert torch.equal(parts.index, whole.index) and int(parts.visited) == int(whole.visited)


@interpreter
def test_why_it_cannot_search():
    from saccade.ops.nearest import triton as kernel

    index, q = made(1, 200, 8, 1)
    assert kernel.reasons(index, q, 1024) == []
    assert "a beam of 2048 keys; it takes 1024 at most" in kernel.reasons(index, q, 1025)
    assert "torch.float64 inputs; it compares in float32" in kernel.reasons(index, q.double(), 5)
    turned = dataclasses.replace(index, keys=index.keys.mT.contiguous().mT)
    assert "the numbers of a key do not lie beside each other" in kernel.reasons(turned, q, 5)
    text = "parts of the index lie neither on the meta device nor in pinned host memory"
    assert text in kernel.reasons(index, q.to("meta"), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("beam, degree", [(5, 4), (128, 35), (300, 35), (1024, 35)])
def test_on_a_gpu_beams_of_every_width(beam, degree):
    """Over an index on the device and one in pinned host memory."""
    index, q = made(2, 3000, 64, beam, torch.bfloat16, beam=beam, degree=degree)
    for pin in (False, True):
        check(index, q, 5, "cuda", pin)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [16, 80, 128, 256])
def test_on_a_gpu_keys_of_every_size(dtype, d):
    index, q = made(2, 3000, d, 0, dtype, beam=100)
    check(index, q, 5, "cuda", pin=True, several=False)


@pytest.mark.gpu
def test_on_a_gpu_the_op_takes_it_where_it_can():
    from unittest import mock

    from saccade.ops.nearest import triton as kernel

    index, q = made(2, 5000, 64, 0, beam=64)
    want = index.search(q, 20)
    with mock.patch.object(kernel, "search", wraps=kernel.search) as took:
        for there in (index.moved(lambda x: x.pin_memory()), index.moved(torch.Tensor.cuda), index):
            found = there.search(q.cuda(), 20)
            assert found.index.is_cuda and (found.index.cpu() == want.index).float().mean() > 0.98
        assert took.call_count == 2, "not of what the device cannot read"
        wide = dataclasses.replace(index, beam=2000).moved(lambda x: x.pin_memory()).search(q.cuda(), 20)
        assert took.call_count == 2 and wide.index.is_cuda
