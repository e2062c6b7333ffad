"""pool_and_select: by its meaning in plain torch, and by Triton in its interpreter and on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.errors import BadInput, CannotRun
from tests.ops._triton import interpreter, run_in_interpreter
from tests.ops.shapes import HEAD_SIZES, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "keys": st.integers(1, 120),
    "queries": st.integers(1, 120),
    "q_block": st.sampled_from([8, 24, 64]),
    "k_block": st.sampled_from([8, 16, 24, 64]),
    "keep": st.integers(1, 6),
    "how": st.sampled_from(["mean", "max"]),
    "sink": st.booleans(),
    "diagonal": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
}


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def check(keys, queries, q_block, k_block, keep, how, sink, diagonal, dtype, impl, size=32, device="cpu"):
    """Every row keeps as many as it may, and none that it left out scores better than one it kept, but for rounding."""
    queries = min(queries, keys)
    q, k, _ = (x.to(device) for x in tensors(2, 4, 2, queries, keys, size, dtype))
    forced = {"force_sink": sink, "force_diagonal": diagonal}
    said = []
    blocks = ops.pool_and_select(
        q, k, keep_blocks=keep, q_block=q_block, k_block=k_block, how=how, impl=impl, report=said.append, **forced
    )
    assert impl == "auto" or said == [f"pool_and_select:{impl}"]
    table = blocks.table()
    pooled_q, pooled_k = (ops.pool_blocks(x, n, how).double() for x, n in ((q, q_block), (k, k_block)))
    score = pooled_q @ pooled_k.repeat_interleave(2, 1).mT
    reach = (torch.arange(1, score.shape[2] + 1, device=device) * q_block).clamp(max=queries) + keys - queries - 1
    last = reach // k_block
    allowed = torch.arange(score.shape[3], device=device) <= last[:, None]
    assert not (table & ~allowed).any()
    assert torch.equal(table.sum(-1), (last + 1).clamp(max=keep).expand_as(table[..., 0]))
    slack = (2e-3 if device == "cuda" else 1e-4) * score.abs().amax()  # tf32 there
    if sink:
        score[..., 0] = torch.inf
    if diagonal:
        score.scatter_(-1, last[:, None].expand(2, 4, -1, 1), torch.inf)
    worst = score.masked_fill(~table, torch.inf).amin(-1)
    best = score.masked_fill(table | ~allowed, -torch.inf).amax(-1)
    assert (best <= worst + slack).all()


@settings(max_examples=20)
@given(**CASES)
def test_choosing_in_plain_torch(**case):
    check(**case, impl="torch")


@interpreter
@settings(max_examples=5)
@given(**CASES)
def test_choosing(**case):
    check(**case, impl="triton")


def check_lists(n, queries, block, row, whole, device="cpu"):
    """choose_blocks by Triton and by torch: the same lists, of scores that are all different."""
    shape = (1, 2, -(-queries // block), -(-n // block))
    score = torch.randn(shape, generator=rng.generator("scores", *shape)).to(device)
    options = {"queries": queries, "keys": n, "block": block, "row_tokens": row, "whole_last": whole}
    theirs = ops.choose_blocks(score, **options, impl="torch")
    ours = ops.choose_blocks(score, **options, impl="triton")
    assert torch.equal(ours.crow, theirs.crow) and torch.equal(ours.col, theirs.col)
    score[..., 0] = -torch.inf
    ours, last = ops.choose_blocks(score, **options, impl="triton"), ours.crow
    assert torch.equal(ours.crow, last) and int(ours.col.min()) >= 0, "what is minus infinity fills a list, if need be"


@interpreter
@settings(max_examples=8)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 4, 8]), st.integers(0, 40), st.integers(0, 3))
def test_lists_of_blocks(n, queries, block, more, whole):
    queries = min(n, queries)
    check_lists(n, queries, block, min(n, (2 if (n - queries) % block else 1) * block + more), whole)


@interpreter
def test_lists_that_it_cannot_make_say_why():
    for score, by, why in (
        (torch.zeros(1, 1, 2, 2, dtype=torch.float64), {"row_tokens": 4}, "the scores are float64"),
        (torch.zeros(1, 1, 2, 2), {"threshold": 0.1}, "a threshold was given"),
        (torch.zeros(1, 1, 1, 16385), {"row_tokens": 4}, "16385 key blocks; it takes up to 16384"),
    ):
        with pytest.raises(CannotRun, match=why):
            ops.choose_blocks(score, queries=score.shape[2], keys=score.shape[3], block=1, **by, impl="triton")


@pytest.mark.gpu
def test_lists_of_blocks_on_a_gpu():
    for case in ((20000, 20000, 64, 2000, 2), (3001, 1001, 16, 300, 1), (777, 777, 128, 256, 0)):
        check_lists(*case, "cuda")


@interpreter
def test_what_it_cannot_run_says_why():
    q, k, _ = (x.double() for x in tensors(1, 2, 1, 1, 16500, 260))
    with pytest.raises(CannotRun) as error:
        ops.pool_and_select(q, k, keep_blocks=2, k_block=1, impl="triton")
    for why in ("the inputs are float64", "heads of 260; it takes up to 256", "16500 key blocks; it takes up to 16384"):
        assert why in str(error.value)


def test_nothing_to_keep_is_refused():
    q, k, _ = tensors(1, 2, 1, 8, 8, 16)
    with pytest.raises(BadInput, match="keep 0 blocks of 64 keys"):
        ops.pool_and_select(q, k, keep_blocks=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_choosing_on_a_gpu(size, dtype):
    for keys, queries, block, keep in ((5000, 5000, 128, 8), (3001, 1001, 64, 5), (777, 777, 16, 3)):
        for how in ("mean", "max"):
            check(keys, queries, block, block, keep, how, True, True, dtype, "auto", size, "cuda")
