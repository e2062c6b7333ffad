"""The kernel that makes lists for flash-attn-4, against plain PyTorch: in Triton's interpreter, on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.ops.attend import flash4
from tests.ops._triton import interpreter, run_in_interpreter
from tests.ops.test_attend_flash4 import selection
from tests.ops.test_attend_triton import moved

CPU = torch.device("cpu")


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def assert_the_same(s, rows, device):
    from saccade.ops.attend.flash4_lists import split

    ours, exact = split(moved(s, device), rows, device), flash4._of_queries(s, rows, CPU)
    for at in (0, 2):
        count, block = ours[at].cpu(), ours[at + 1].cpu()
        assert torch.equal(count, exact[at]) and block.is_contiguous() and block.dtype == torch.int32
        width = min(block.shape[-1], exact[at + 1].shape[-1])
        listed = torch.arange(width) < count[..., None]
        assert count.max() <= width
        assert torch.equal(block[..., :width][listed], exact[at + 1][..., :width][listed])


@st.composite
def cases(draw, most: int):
    rows, keys = draw(st.sampled_from([128, 256])), draw(st.integers(1, most))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    sizes = {"q_block": rows * draw(st.integers(1, 3)), "k_block": 128 * draw(st.integers(1, 3))}
    sizes |= {"b": draw(st.integers(1, 2)), "h": draw(st.integers(1, 2)), "seed": draw(st.integers(0, 99))}
    return selection(draw(st.sampled_from(["blocks", "bounds"])), queries, keys, **sizes), rows


@interpreter
@given(cases(900))
def test_small_ones(case):
    assert_the_same(*case, CPU)


@interpreter
def test_more_entries_than_are_read_at_a_time():
    assert_the_same(selection("blocks", 200, 40_000), 128, CPU)


@pytest.mark.gpu
@given(cases(60_000))
def test_on_a_gpu(case):
    assert_the_same(*case, torch.device("cuda"))
