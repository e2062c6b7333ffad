"""decode, column_scores and merge_lse against float64, and by their errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput, CannotRun
from saccade.core.selection import Gather, causal_mask
from saccade.ops.column_scores import torch as tiled
from tests.helpers import TURNS, assert_close_as_torch, assert_no_worse, exact_attention, torch_attention
from tests.ops.shapes import drawn, tensors

KEYS = st.integers(1, 90)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(KEYS, st.integers(1, 40), DTYPES, st.booleans(), st.booleans(), st.sampled_from([None, 5.0]), st.integers(1, 2))
def test_decode_is_attention_under_its_mask(keys, queries, dtype, listed, narrowed, softcap, rows):
    queries = min(queries, keys)
    q, k, v = tensors(2, 4, 2, queries, keys, 32, dtype)
    mask = causal_mask(queries, keys)[None, None]
    index = visible = None
    if listed:
        index = torch.argsort(drawn((rows, 4, queries, keys), 0, 1 << 30, 1), -1)[..., : keys // 2 + 1].int()
        index = index.masked_fill(drawn(index.shape, 0, 3, 2) == 0, -1)
        mask = Gather(index=index, queries=queries, keys=keys).mask()
    if narrowed:
        visible = drawn((rows, 1, queries, keys), 0, 3, 3) > 0
        mask = mask & visible
    for impl in ("auto", "reference"):
        out, lse = ops.decode(q, k, v, index, visible=visible, softcap=softcap, impl=impl)
        assert out.dtype == dtype
        assert_close_as_torch(out, q, k, v, mask, softcap=softcap, lse=lse)


SEVERAL = st.integers(1, 4)


@given(KEYS, st.integers(1, 40), DTYPES, st.booleans(), st.sampled_from([None, 5.0]), SEVERAL, st.integers(0, 9))
@example(39, 1, torch.float32, False, None, 1, 0)
def test_merged_keys_count_as_often_as_they_have_tokens(keys, queries, dtype, narrowed, softcap, several, seed):
    """The same as attention over a text in which such keys are written out, in each key/value head by itself."""
    queries, several = min(queries, keys), min(several, keys)
    q, k, v = tensors(2, 4, 2, queries, keys, 32, dtype)
    index = torch.argsort(drawn((2, 2, keys), 0, 1 << 30, seed), -1)[..., :several]
    times = drawn((2, 2, several), 1, 6, seed)
    visible = drawn((2, 1, queries, keys), 0, 3, seed) > 0 if narrowed else None
    mask = causal_mask(queries, keys)[None, None] & (torch.ones(1, dtype=torch.bool) if visible is None else visible)
    for impl in ("auto", "reference"):
        out, lse = ops.decode(q, k, v, visible=visible, merged=(index, times), softcap=softcap, impl=impl)
        assert out.dtype == dtype
        for b in range(2):
            for g in range(2):
                here = torch.ones(keys, dtype=torch.long).scatter(0, index[b, g], times[b, g])
                written = torch.arange(keys).repeat_interleave(here)
                wide = [x[b : b + 1, g : g + 1, written] for x in (k, v)]
                mine = slice(2 * g, 2 * g + 2)
                seen = mask.expand(2, 4, -1, -1)[b : b + 1, mine][..., written]
                one = [x[b : b + 1, g : g + 1] for x in (k, v)]
                also = _counted(q[b : b + 1, mine], *one, mask.expand(2, 4, -1, -1)[b : b + 1, mine], here, softcap)
                options = {"softcap": softcap, "lse": lse[b : b + 1, mine], "also": also}
                assert_close_as_torch(out[b : b + 1, mine], q[b : b + 1, mine], *wide, seen, **options)


def _counted(q, k, v, mask, times, softcap):
    """By PyTorch's operations as they come: all keys, and once more those that count several times, joined by lse."""
    for turn in TURNS:
        logits = q.roll(turn, -1) @ k.roll(turn, -1).mT * q.shape[-1] ** -0.5
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        both = [logits.masked_fill(~mask, -torch.inf), (logits + (times - 1).log()).masked_fill(~mask, -torch.inf)]
        whole = torch.logaddexp(*(x.logsumexp(-1) for x in both))
        share = [(x.logsumexp(-1) - whole).exp().nan_to_num()[..., None].to(q.dtype) for x in both]
        yield sum(s * (x.softmax(-1).nan_to_num().to(q.dtype) @ v) for s, x in zip(share, both)), whole


@given(KEYS, st.integers(1, 40), st.booleans(), st.sampled_from([None, 5.0]))
def test_column_scores_are_column_sums_of_the_softmax(keys, queries, causal, softcap):
    queries = min(queries, keys)
    q, k, _ = tensors(2, 4, 2, queries, keys, 32)
    exact = ops.column_scores(q.double(), k.double(), causal=causal, softcap=softcap, impl="reference")
    # one torch.softmax, at several orders of the head axis: the same but for rounding
    turned = [(q.roll(t, -1), k.roll(t, -1)) for t in TURNS]
    theirs = [ops.column_scores(*x, causal=causal, softcap=softcap, impl="reference") for x in turned]
    assert_no_worse(ops.column_scores(q, k, causal=causal, softcap=softcap), exact, theirs)
    assert torch.isclose(exact.sum(-1), torch.tensor(float(queries), dtype=torch.float64)).all()


@given(KEYS, st.integers(1, 40), st.sampled_from([None, 5.0]), st.integers(0, 9))
def test_column_scores_of_queries_at_places_of_their_own(keys, queries, softcap, seed):
    """As one causal query after the other over the keys up to its own."""
    q, k, _ = tensors(2, 4, 2, queries, keys, 32)
    at = drawn((queries,), 0, keys, seed)
    exact, theirs = 0, [0] * len(TURNS)
    for i, last in enumerate(at.tolist()):
        q1, k1 = q[:, :, i : i + 1], k[:, :, : last + 1]
        whole = [(q1.double(), k1.double()), *((q1.roll(t, -1), k1.roll(t, -1)) for t in TURNS)]
        scores = [ops.column_scores(*x, softcap=softcap, impl="reference") for x in whole]
        wide = [torch.nn.functional.pad(x, (0, keys - last - 1)) for x in scores]
        exact, theirs = exact + wide[0], [a + b for a, b in zip(theirs, wide[1:])]
    for impl in ("auto", "reference"):
        assert_no_worse(ops.column_scores(q, k, at=at, softcap=softcap, impl=impl), exact, theirs)


def test_column_scores_over_many_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 7)
    monkeypatch.setattr(tiled, "ROWS", 5)
    q, k, _ = tensors(1, 4, 2, 23, 60, 32)
    exact = ops.column_scores(q.double(), k.double(), impl="reference")
    assert_no_worse(ops.column_scores(q, k), exact, [ops.column_scores(q, k, impl="reference")])
    at = drawn((23,), 0, 60, 0)
    exact = ops.column_scores(q.double(), k.double(), at=at, impl="reference")
    assert_no_worse(ops.column_scores(q, k, at=at), exact, [ops.column_scores(q, k, at=at, impl="reference")])


@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 9))
def test_merging_parts_equals_the_whole_both_ways(keys, parts, seed):
    inputs = tensors(1, 2, 1, 8, keys, 32)
    part = drawn((1, 1, 8, keys), -1, parts, seed)  # -1: in no part

    def merged(q, k, v, mask):
        return ops.merge_lse(*zip(*[exact_attention(q, k, v, mask & (part == i)) for i in range(parts)]))

    q, k, v = (x.double().requires_grad_() for x in inputs)
    out, lse = merged(q, k, v, part >= 0)
    whole, whole_lse = exact_attention(q, k, v, part >= 0)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


@given(st.integers(1, 4), st.integers(0, 9))
def test_merging_has_finite_and_right_gradients_where_parts_see_nothing(parts, seed):
    outs = tensors(parts, 2, 1, 8, 1, 4, torch.float64)[0][:, None].unbind(0)
    lses = drawn((parts, 1, 2, 8), 0, 3, seed).double()
    lses = [x.masked_fill(x == 0, -torch.inf).requires_grad_() for x in lses]
    outs = [o.requires_grad_() for o in outs]
    out, lse = ops.merge_lse(outs, lses)
    (out.sum() + torch.where(lse > -torch.inf, lse, 0.0).sum()).backward()
    for o, e in zip(outs, lses):
        weight = torch.where(e > -torch.inf, (e - lse).exp(), 0.0)
        torch.testing.assert_close(o.grad, weight[..., None].expand_as(o))
        torch.testing.assert_close(e.grad, weight * ((o - out).sum(-1) + 1))


def test_merging_keeps_the_dtype_of_the_outputs():
    q, k, v = tensors(1, 2, 1, 4, 9, 32, torch.bfloat16)
    out, lse = ops.merge_lse(*zip(*[ops.decode(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 9), slice(0, 9))]))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    mask = causal_mask(4, 9)[None, None]
    assert_no_worse(out, exact_attention(q, k, v, mask)[0], [torch_attention(q, k, v, mask)[0]])


ERRORS = {
    "the queries are the last of the keys": lambda q, k, v: ops.decode(q, k[:, :, :2], v[:, :, :2]),
    "decode with index (1, 4, 5, 2): it does not fit [1, 4, 3, any]": lambda q, k, v: ops.decode(
        q, k, v, torch.zeros(1, 4, 5, 2)
    ),
    "decode with visible (1, 1, 3, 8): it does not fit [1, 4, 3, 9]": lambda q, k, v: ops.decode(
        q, k, v, visible=torch.ones(1, 1, 3, 8, dtype=torch.bool)
    ),
    "merged keys are read with all others": lambda q, k, v: ops.decode(
        q, k, v, torch.zeros(1, 1, 3, 2).int(), merged=(torch.zeros(1, 2, 1).int(), torch.ones(1, 2, 1).int())
    ),
    "decode: merged keys are read with all others, and as they are. Give no index": lambda q, k, v: ops.decode(
        q, ops.quantise(k, 8), ops.quantise(v, 8), merged=(torch.zeros(1, 2, 1).int(), torch.ones(1, 2, 1).int())
    ),
    "decode with merged (1, 2, 1) and (1, 2, 2): they do not both fit [1, 2, any]": lambda q, k, v: ops.decode(
        q, k, v, merged=(torch.zeros(1, 2, 1).int(), torch.ones(1, 2, 2).int())
    ),
    "a row must see one": lambda q, k, v: ops.column_scores(q, k[:, :, :2]),
    "queries at (2,) places: 3 queries, causal. Give each": lambda q, k, v: ops.column_scores(q, k, at=torch.ones(2)),
    "which see every key": lambda q, k, v: ops.column_scores(q, k, causal=False, at=torch.zeros(q.shape[2])),
    "merge 1 outputs with 0 lses": lambda q, k, v: ops.merge_lse([q], []),
    "an output (1, 4, 3, 32) with lse (1, 4, 3, 32)": lambda q, k, v: ops.merge_lse([q], [q]),
}


@pytest.mark.parametrize("text", ERRORS)
def test_inputs_that_do_not_fit_are_refused(text):
    with pytest.raises(BadInput) as error:
        ERRORS[text](*tensors(1, 4, 2, 3, 9, 32))
    assert text in str(error.value)


def test_back_ends_that_are_not_there_are_refused():
    q, k, v = tensors(1, 4, 2, 3, 9, 32)
    with pytest.raises(CannotRun, match="decode with impl='triton'"):
        ops.decode(q, k, v, impl="triton")
    with pytest.raises(CannotRun, match="column_scores with impl='triton'"):
        ops.column_scores(q, k, impl="triton")
