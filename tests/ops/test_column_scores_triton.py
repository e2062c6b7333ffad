"""column_scores and line_scores by Triton against float64: in its interpreter, and on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade import ops
from saccade.core.errors import BadInput, CannotRun
from saccade.core.selection import causal_mask
from tests.helpers import TURNS, assert_no_worse
from tests.ops._triton import interpreter, run_in_interpreter
from tests.ops.shapes import HEAD_SIZES, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def weights(q: Tensor, k: Tensor, softcap: float | None, causal: bool, scaled: bool = False) -> Tensor:
    """softmax of all logits, by PyTorch; products in the precision of q, the rest in float32 or better.

    scaled: the queries are scaled, not the logits
    """
    scale = q.shape[-1] ** -0.5
    logits = (q * scale if scaled else q) @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    return finished(logits, 1.0 if scaled else scale, softcap, causal).softmax(-1)


def yardsticks(q: Tensor, k: Tensor, softcap: float | None, causal: bool) -> list[Tensor]:
    """PyTorch's own weights: the head axis turned, queries or logits scaled; its products added in the order of the
    head axis, as a kernel without tensor cores does; and from the log-sum-exp, as the backward of its attention does.
    """
    every = [weights(q.roll(t, -1), k.roll(t, -1), softcap, causal, s) for t in TURNS for s in (False, True)]
    keys, scale = k.repeat_interleave(q.shape[1] // k.shape[1], 1), q.shape[-1] ** -0.5
    if q.dtype == torch.float32:
        every.append(finished(in_order(q, keys), scale, softcap, causal).softmax(-1))
    logits = finished((q @ keys.mT).float(), scale, softcap, causal)
    return [*every, torch.exp(logits - logits.logsumexp(-1, keepdim=True))]


def in_order(q: Tensor, keys: Tensor) -> Tensor:
    """q k^T, one number of the head axis after the other."""
    out = torch.zeros(*q.shape[:3], keys.shape[2], device=q.device)
    for i in range(q.shape[-1]):
        out = torch.addcmul(out, q[..., i : i + 1], keys[..., i].unsqueeze(-2))
    return out


def finished(logits: Tensor, scale: float, softcap: float | None, causal: bool) -> Tensor:
    """Scaled, capped and masked."""
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        logits = logits.masked_fill(~causal_mask(*logits.shape[-2:], logits.device), -torch.inf)
    return logits


def along(p: Tensor) -> Tensor:
    """Sums along diagonals, numbered by how far the key is behind its query."""
    w, n = p.shape[-2:]
    behind = torch.arange(n - w, n, device=p.device)[:, None] - torch.arange(n, device=p.device)
    out = torch.zeros_like(p[..., 0, :])
    for r in range(w):
        seen = behind[r] >= 0
        out[..., behind[r][seen]] += p[..., r, seen]
    return out


def check(q: Tensor, k: Tensor, softcap: float | None, causal: bool) -> None:
    """Columns, and with `causal` diagonals, are as right as PyTorch's."""
    exact = weights(q.double(), k.double(), softcap, causal)
    theirs = yardsticks(q, k, softcap, causal)
    said = []
    ours = ops.column_scores(q, k, softcap=softcap, causal=causal, impl="triton", report=said.append)
    assert said == ["column_scores:triton"] and ours.dtype == torch.float32
    assert_no_worse(ours, exact.sum(-2), [p.sum(-2) for p in theirs], "columns")
    if causal:
        columns, diagonals = ops.line_scores(q, k, softcap=softcap, impl="triton")
        assert_no_worse(columns, exact.sum(-2), [p.sum(-2) for p in theirs], "columns beside diagonals")
        assert_no_worse(diagonals, along(exact), [along(p) for p in theirs], "diagonals")


@interpreter
@settings(max_examples=4)
@given(
    st.integers(1, 150),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([None, 5.0]),
    st.sampled_from([16, 48]),
)
def test_sums_of_the_softmax(keys, queries, dtype, causal, softcap, size):
    q, k, _ = tensors(2, 4, 2, min(queries, keys), keys, size, dtype)
    check(q, k, softcap, causal)


@interpreter
@pytest.mark.parametrize("dtype, softcap", [(torch.float32, None), (torch.bfloat16, 5.0)])
@pytest.mark.parametrize("keys", (1, 130))
def test_a_single_query(keys, dtype, softcap):
    """Whose logits become its weights, in one pass over the keys."""
    q, k, _ = tensors(2, 6, 2, 1, keys, 16, dtype)
    check(q, k, softcap, True)
    at = torch.tensor([keys // 2])
    theirs = [p[..., 0, :] for p in yardsticks(q, k[:, :, : keys // 2 + 1], None, True)]
    exact = weights(q.double(), k[:, :, : keys // 2 + 1].double(), None, True)[..., 0, :]
    found = ops.column_scores(q, k, at=at, impl="triton")
    assert_no_worse(found[..., : keys // 2 + 1], exact, theirs)
    assert not found[..., keys // 2 + 1 :].any()


@interpreter
def test_as_many_queries_as_it_takes_and_strided_keys():
    q, k, _ = tensors(1, 2, 1, 128, 200, 16)
    room = torch.full((1, 256, 1, 32), torch.nan)
    room[:, :200, :, :16] = k.transpose(1, 2)
    check(q, room[:, :200, :, :16].transpose(1, 2), None, True)


@interpreter
@settings(max_examples=4)
@given(st.integers(1, 150), st.integers(1, 20), st.sampled_from(DTYPES))
def test_queries_at_places_of_their_own(keys, queries, dtype):
    """The last ones turned around: rows in another order."""
    queries = min(queries, keys)
    q, k, _ = tensors(2, 4, 2, queries, keys, 16, dtype)
    at = torch.arange(keys - queries, keys).flip(0)
    theirs = [p.sum(-2) for p in yardsticks(q, k, None, True)]
    exact = weights(q.double(), k.double(), None, True).sum(-2)
    assert_no_worse(ops.column_scores(q.flip(2), k, at=at, impl="triton"), exact, theirs)


@interpreter
def test_what_it_cannot_run_says_why():
    q, k, _ = (x.double() for x in tensors(1, 2, 1, 129, 130, 260))
    for call in (ops.column_scores, ops.line_scores):
        with pytest.raises(CannotRun) as error:
            call(q, k, impl="triton")
        for why in ("the inputs are float64", "heads of 260; it takes up to 256", "129 queries"):
            assert why in str(error.value)


def test_lines_of_more_queries_than_keys_are_refused():
    q, k, _ = tensors(1, 2, 1, 5, 4, 16)
    with pytest.raises(BadInput, match="line scores of 5 queries over 4 keys"):
        ops.line_scores(q, k)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_lines_in_plain_torch(softcap):
    q, k, _ = tensors(2, 4, 2, 13, 50, 16)
    exact = weights(q.double(), k.double(), softcap, True)
    theirs = [weights(q.roll(t, -1), k.roll(t, -1), softcap, True) for t in TURNS]
    columns, diagonals = ops.line_scores(q, k, softcap=softcap)
    assert_no_worse(columns, exact.sum(-2), [p.sum(-2) for p in theirs])
    assert_no_worse(diagonals, along(exact), [along(p) for p in theirs])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_values_on_a_gpu(size, dtype):
    some = ((1, 5003, None, True), (1, 700, 5.0, False), (64, 3001, None, True), (128, 500, 5.0, True))
    for queries, keys, softcap, causal in (*some, (7, 1000, None, False)):
        q, k, _ = (x.cuda() for x in tensors(1, 8, 2, queries, keys, size, dtype))
        if dtype == torch.float32 and (size > 128 or (size > 64 and queries > 64)):
            with pytest.raises(CannotRun, match="more than a multiprocessor holds"):
                ops.line_scores(q, k, impl="triton")
        else:
            check(q, k, softcap, causal)
