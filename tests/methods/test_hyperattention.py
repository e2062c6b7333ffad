"""HyperAttention against its recursion as plain loops over single pairs; its estimate, its budget, its errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.attach import attach
from saccade.core import rng
from saccade.core.errors import BadOption, CannotRun
from saccade.core.selection import Together, dense
from saccade.methods.sparse.hyperattention import HyperAttention
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens

SHARES = st.floats(0.02, 1.0)
SMALL = HyperAttention(sizes="paper", block_tokens=4, sample_tokens=3, exact_tokens=8)


def tensors(n, rows=2):
    """q, k, v of four heads over two, in float64."""
    return [noise(rows, heads, n, 8, name=name).double() for heads, name in ((4, "q"), (2, "k"), (2, "v"))]


# --- the recursion, pair by pair --------------------------------------------------------------------------------------


def code(x, projection):
    """Number of a bucket: the bits of a Gray code, read back."""
    bits = [int(x @ p > 0) for p in projection.T]
    value = 0
    for bit in reversed(bits):
        value = value << 1 | (bit ^ (value & 1))
    return value


def approximate(weights, q, k, queries, keys, method, drawn, projection):
    """Log-weights of the queries [..) over the keys [..) of one node, as a stable sort and equal ranks give them."""
    width = len(keys)
    blocks = 1 if method.block_tokens + method.sample_tokens >= width else math.ceil(width / method.block_tokens)
    ranked = [sorted(at, key=lambda i, x=x: code(x[i], projection)) for x, at in ((q, queries), (k, keys))]
    own = [{i: rank * blocks // len(order) for rank, i in enumerate(order)} for order in ranked]
    sample = [ranked[1][rank] for rank in drawn] if blocks > 1 else []
    for i in queries:
        for j in keys:
            if own[0][i] == own[1][j]:
                weights[i, j] = 0.0
            elif j in sample:
                weights[i, j] = math.log(width / len(sample))


def log_weights(q, k, method, here, head, causal=True):
    """[n n] of one head."""
    n = len(q)
    draw = rng.generator("hyperattention/projections", here.seed, here.layer)
    projection = torch.randn(q.shape[1], method.projections, generator=draw).to(q)
    weights = torch.full((n, n), -torch.inf, dtype=torch.float64)

    def node(width, queries, keys):
        m = min(method.sample_tokens, width)
        drawn = method._drawn(width, m, here)[head].tolist() if m else []
        approximate(weights, q, k, queries, keys, method, drawn, projection)

    def halve(first, width):
        """[first, first + width), as far as there are tokens."""
        if width <= method.exact_tokens:
            for i in range(first, min(first + width, n)):
                weights[i, first : i + 1] = 0.0
            return
        middle = first + width // 2
        halve(first, width // 2)
        if middle < n:
            halve(middle, width // 2)
            node(width // 2, list(range(middle, min(first + width, n))), list(range(first, middle)))

    if causal:
        halve(0, method.exact_tokens << max(0, math.ceil(math.log2(n / method.exact_tokens))))
    else:
        node(n, list(range(n)), list(range(n)))
    return weights


def by_formula(q, k, v, method, here, causal=True):
    """softmax(logits + log-weights) v, and its log-sum-exp."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    every = [[log_weights(a, b, method, here, h, causal) for h, (a, b) in enumerate(zip(*r))] for r in zip(q, k)]
    logits = q @ k.mT * here.scale + torch.stack([torch.stack(row) for row in every])
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@settings(max_examples=8)
@given(st.integers(16, 75), st.sampled_from([1, 4, 7]), st.sampled_from([0, 3, 5]), st.integers(0, 3))
def test_it_is_the_recursion(n, block, sample, seed):
    method, here = replace(SMALL, block_tokens=block, sample_tokens=sample), site(queries=n, keys=n, seed=seed, layer=1)
    inputs = tensors(n)
    found = ops.attend(*inputs, method.select(*inputs[:2], here), scale=here.scale)
    for ours, theirs in zip(found, by_formula(*inputs, method, here)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_formula(causal):
    n, here = 50, site(queries=50, keys=50)
    inputs = [x.requires_grad_() for x in tensors(n, rows=1)]
    select = SMALL.select if causal else SMALL.without_order
    out = ops.attend(*inputs, select(*inputs[:2], here), scale=here.scale)
    exact = by_formula(*inputs, SMALL, here, causal)
    torch.testing.assert_close(out, exact)
    for ours, theirs in zip(*(torch.autograd.grad(o.square().sum() + e.sum(), inputs) for o, e in (out, exact))):
        torch.testing.assert_close(ours, theirs)


# --- the estimate -----------------------------------------------------------------------------------------------------


def test_the_sum_of_each_row_is_estimated_without_bias():
    n, draws = 40, 150
    q, k, v = tensors(n, rows=1)
    sums = []
    for layer in range(draws):  # a draw, and a hash, of its own
        here = site(queries=n, keys=n, layer=layer)
        sums.append(ops.attend(q, k, v, SMALL.select(q, k, here), scale=here.scale)[1].exp())
    found = torch.stack(sums)
    exact = (q @ k.repeat_interleave(2, 1).mT * here.scale).exp().tril().sum(-1)
    away = (found.mean(0) - exact).abs() / (found.std(0) / draws**0.5).clamp(min=1e-9 * exact.max())
    assert away.max() < 6  # standard errors, of 160 rows


def test_more_samples_are_nearer_and_all_are_exact():
    n = 256
    (q, k, v), here = tensors(n, rows=1), site(queries=n, keys=n)
    exact, errors = ops.attend(q, k, v, dense(n, n, causal=False), scale=here.scale)[0], []
    for sample in (2, 8, 32, 252):
        method = HyperAttention(block_tokens=4, sample_tokens=sample)
        errors.append(float((ops.attend(q, k, v, method.without_order(q, k, here), scale=here.scale)[0] - exact).std()))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[3] < torch.finfo(torch.float64).eps * n


@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 5))
def test_what_is_drawn_is_ascending_and_each_key_as_likely(width, sample, seed):
    sample = min(sample, width)
    drawn = SMALL._drawn(width, sample, site(queries=1, keys=1, seed=seed))
    assert drawn.shape == (4, sample) and (drawn.diff(dim=-1) > 0).all()
    assert drawn.min() >= 0 and drawn.max() < width
    if sample == width:
        assert torch.equal(drawn[0], torch.arange(width))


# --- the budget -------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(1, 200), SHARES | st.integers(1, 40).map("{}tok".format), st.integers(0, 1))
def test_what_is_computed_is_within_the_budget(n, budget, dense_layers):
    method = HyperAttention(dense_layers=dense_layers if isinstance(budget, float) and budget > 0.5 else 0)
    used = 0.0
    for layer in range(2):
        here = site(budget, queries=n, keys=n, layer=layer)
        selection = method.select(*tensors(n)[:2], here)
        assert selection.mask().diagonal(dim1=-2, dim2=-1).all()
        assert torch.equal(selection.count(), selection.mask().double().sum((-2, -1)))
        if isinstance(selection, Together):
            assert sum(part.mask().int() for part in selection.parts).max() == 1
        used += float(selection.count().max())
    row = here.budget.row_tokens(n)
    allowed = here.budget.amount * n * (n + 1) / 2 if isinstance(budget, float) else row * n - row * (row - 1) / 2
    assert used <= 2 * max(n, allowed) + 1e-6  # a budget has as much room for rounding


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_a_long_prompt_spends_it(share):
    n = 1024
    selection = HyperAttention().select(*tensors(n, 1)[:2], site(share, queries=n, keys=n))
    assert 0.85 * share < float(selection.density().mean()) <= share


def test_the_papers_sizes_are_exact_until_a_half_is_a_piece():
    for n, kinds in ((8191, {"spans"}), (8192, {"together"})):
        q, k = torch.zeros(1, 4, n, 8), torch.zeros(1, 2, n, 8)
        assert {HyperAttention(sizes="paper").select(q, k, site(queries=n, keys=n)).kind} == kinds


def test_the_last_queries_of_a_prompt_are_halved_where_all_would_be():
    n, queries = 200, 77
    q, k, _ = tensors(n)
    whole = SMALL.select(q, k, site(queries=n, keys=n)).parts
    last = SMALL.select(q[:, :, -queries:], k, site(queries=queries, keys=n)).parts
    assert torch.equal(last[0].mask()[0, 0], whole[0].mask()[0, 0, -queries:])
    assert (last[0].mask() | last[1].mask()).any(-1).all() and len(last) <= len(whole)


# --- in a model -------------------------------------------------------------------------------------------------------


def test_first_layers_may_stay_dense_and_a_full_budget_is_dense():
    model, ids = tiny(), tokens(70)
    with torch.no_grad():
        alone = model(ids).logits
    for spec in (HyperAttention(), replace(SMALL, dense_layers=2)):
        with attach(model, spec):
            torch.testing.assert_close(in_pieces(model, ids, [50]), alone)
    with attach(model, SMALL) as run:
        assert not torch.allclose(in_pieces(model, ids, [50]), alone)
    assert run.record.density("prefill") < 1 == run.record.density("decode")


def test_a_model_can_be_trained_through_it():
    model, ids = tiny(), tokens(64)
    with attach(model, SMALL):
        model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)


def test_options_that_cannot_be():
    for name in ("block_tokens", "exact_tokens", "projections"):
        with pytest.raises(BadOption, match=rf"hyperattention\.{name}=0: it takes at least 1"):
            HyperAttention(**{name: 0})
    with pytest.raises(BadOption, match=r"hyperattention\.projections=16: it takes at most 15"):
        HyperAttention(projections=16)
    refused = {
        "would ignore the budget 0.5": (HyperAttention(sizes="paper"), 0.5),
        "dense_layers=1 would exceed the budget 9tok": (HyperAttention(dense_layers=1), "9tok"),
        "dense_layers=1 of 2 layers alone exceed budget=0.25": (HyperAttention(dense_layers=1), 0.25),
        "the budget 4096B is in bytes": (HyperAttention(), "4KiB"),
    }
    for text, (method, budget) in refused.items():
        with pytest.raises(CannotRun, match=text):
            attach(tiny(), method, budget=budget)
