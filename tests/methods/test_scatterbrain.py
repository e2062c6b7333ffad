"""Scatterbrain against the approximate matrix written out entry by entry; its support by plain loops; its estimate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.attach import attach
from saccade.core.errors import BadOption, CannotRun
from saccade.core.selection import causal_mask
from saccade.methods.sparse.scatterbrain import Scatterbrain
from tests.methods.handmade import in_pieces, noise, tiny, tokens
from tests.methods.handmade import site as bare_site
from tests.mixers import assert_as_good

HASH, WINDOW = Scatterbrain(hashes=3), Scatterbrain(support="window")


def tensors(n, queries=None, rows=1):
    """q, k, v of four heads over two, in float64."""
    sizes = ((4, queries or n, "q"), (2, n, "k"), (2, n, "v"))
    return [noise(rows, heads, many, 8, name=name).double() for heads, many, name in sizes]


def site(budget, **shape):
    return bare_site(budget, partial=ops.attend, **shape)


# --- entry by entry ---------------------------------------------------------------------------------------------------


def feature(x, directions, scale):
    """phi(x) as the paper has it."""
    x = x * math.sqrt(scale)
    both = [sign * float(w @ x) for sign in (1, -1) for w in directions]
    return torch.tensor([math.exp(y - float(x @ x) / 2) for y in both], dtype=torch.float64) / len(both) ** 0.5


def support(q, k, method, here):
    """Which keys of one head each query has exactly, as sorting and cutting gives them."""
    n, asking = len(k), len(q)
    exact, _ = method.sizes(here)
    found = [{i + n - asking} for i in range(asking)]
    if method.support == "window":
        return [set(range(max(0, i + n - asking - exact + 1), i + n - asking + 1)) for i in range(asking)]
    longest = max(float(x @ x) for x in q) + max(float(x @ x) for x in k)
    clusters = max(1, n // min(n, math.ceil(2 * exact / method.hashes)))
    for line in method.lines(here):

        def along(x, other, line=line):
            return float(x @ line[:-2]) + math.sqrt(max(0.0, longest - float(x @ x))) * float(line[other])

        by_query = sorted(range(asking), key=lambda i: along(q[i], -1))
        by_key = sorted(range(n), key=lambda j: along(k[j], -2))
        for rank, i in enumerate(by_query):
            mine = rank * clusters // asking
            found[i] |= {j for r, j in enumerate(by_key) if r * clusters // n == mine and j <= i + n - asking}
    return [set(sorted(some)[-exact:]) for some in found]


def by_formula(q, k, v, method, here):
    """D^-1 A v of every head, A written out."""
    _, features = method.sizes(here)
    directions, out = method.directions(features, here) if features else None, torch.zeros_like(q)
    for b, h in torch.cartesian_prod(torch.arange(len(q)), torch.arange(4)).tolist():
        mine, keys, values = q[b, h], k[b, h // 2], v[b, h // 2]
        exact = support(mine, keys, method, here)
        phi = [[feature(x, directions, here.scale) for x in some] for some in (mine, keys)] if features else []
        for i in range(len(mine)):
            row = torch.zeros(len(keys), dtype=torch.float64)
            for j in range(i + here.offset + 1):
                if j in exact[i]:
                    row[j] = math.exp(here.scale * float(mine[i] @ keys[j]))
                elif features:
                    row[j] = float(phi[0][i] @ phi[1][j])
            out[b, h, i] = row @ values / row.sum()
    return out


@settings(max_examples=6)
@given(n=st.integers(2, 30), queries=st.integers(1, 30), row=st.integers(1, 12), share=st.sampled_from([0.0, 0.5, 1.0]))
@pytest.mark.parametrize("method", [HASH, WINDOW], ids=["hash", "window"])
def test_it_is_the_approximate_matrix(method, n, queries, row, share):
    method, queries = replace(method, exact_share=share), min(n, queries)
    here, inputs = site(f"{row}tok", queries=queries, keys=n, layer=1, seed=row), tensors(n, queries)
    if method.sizes(here)[0] >= n:
        return
    assert_as_good(method.attend(*inputs, here), by_formula(*inputs, method, here), str(here))
    mask, wanted = method.select(*inputs[:2], here).mask().expand(1, 4, -1, -1), torch.zeros(1, 4, queries, n)
    for h in range(4):
        for i, some in enumerate(support(inputs[0][0, h], inputs[1][0, h // 2], method, here)):
            wanted[0, h, i, list(some)] = 1
    assert torch.equal(mask, wanted.bool())


def test_gradients_are_those_of_the_written_matrix():
    """With the support given, A is a smooth function of queries and keys."""
    here, inputs = site("10tok", queries=24, keys=24), [x.requires_grad_() for x in tensors(24)]
    exact = HASH.select(*inputs[:2], here).mask()
    directions = HASH.directions(HASH.sizes(here)[1], here)

    def written():
        q, k, v = inputs[0], *(x.repeat_interleave(2, 1) for x in inputs[1:])
        wide = [x * here.scale**0.5 @ directions.mT for x in (q, k)]
        phi = [torch.cat([w, -w], -1) - here.scale * x.square().sum(-1, keepdim=True) / 2 for w, x in zip(wide, (q, k))]
        products = phi[0].exp() @ phi[1].exp().mT / phi[0].shape[-1]
        a = torch.where(exact, (q @ k.mT * here.scale).exp(), products).masked_fill(~causal_mask(24, 24), 0.0)
        return a @ v / a.sum(-1, keepdim=True)

    found = [torch.autograd.grad(out.square().sum(), inputs) for out in (HASH.attend(*inputs, here), written())]
    for ours, theirs in zip(*found):
        assert_as_good(ours, theirs, "gradients")


# --- the estimate -----------------------------------------------------------------------------------------------------


def test_entries_are_estimated_without_bias_and_features_alone_are_worse():
    """Sums of rows, over draws; then the output, at the same cost."""
    n, draws = 24, 120
    inputs = [x / 2 for x in tensors(n)]  # of long vectors a few draws hold most of the mean
    exact = (inputs[0] @ inputs[1].repeat_interleave(2, 1).mT * 8**-0.5).exp().tril()
    sums = []
    for layer in range(draws):
        here = site("12tok", queries=n, keys=n, layer=layer)
        selection, directions = WINDOW.select(*inputs[:2], here), WINDOW.directions(WINDOW.sizes(here)[1], here)
        rest = WINDOW._rest(*inputs, selection, directions, here)[1].exp()
        sums.append(rest + (exact * selection.mask()).sum(-1))
    found = torch.stack(sums)[..., 6:]
    away = (found.mean(0) - exact.sum(-1)[..., 6:]).abs() / (found.std(0) / draws**0.5)
    assert away.max() < 6  # standard errors, of 72 rows
    wanted = exact @ inputs[2].repeat_interleave(2, 1) / exact.sum(-1, keepdim=True)
    errors = {}
    for share in (0.0, 0.5):
        method = replace(WINDOW, exact_share=share)
        some = [method.attend(*inputs, site("12tok", queries=n, keys=n, layer=i)) for i in range(10)]
        errors[share] = float((torch.stack(some) - wanted).square().mean())
    assert errors[0.5] < errors[0.0]


@pytest.mark.parametrize("method", [HASH, WINDOW], ids=["hash", "window"])
def test_large_logits_overflow_nothing(method):
    q, k, v = tensors(40)
    here, inputs = site("12tok", queries=40, keys=40), [x.float().requires_grad_() for x in (12 * q, 12 * k, v)]
    out = method.attend(*inputs, here)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


# --- the budget, in a model -------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.integers(1, 200), st.floats(0.02, 1.0) | st.integers(1, 40).map("{}tok".format), st.floats(0, 1))
def test_exact_keys_and_features_are_what_a_row_may_have(n, budget, share):
    here, method = site(budget, queries=n, keys=n), replace(HASH, exact_share=share)
    exact, features = method.sizes(here)
    row = here.budget.row_tokens(n)
    assert (exact, features) == (n, 0) if row >= n else row - 1 <= exact + features <= row and features % 2 == 0
    counts = method.select(*tensors(n)[:2], here).mask().sum(-1)
    assert counts.max() <= exact and counts.min() >= 1


def test_a_model_can_be_trained_through_it_and_a_full_budget_is_dense():
    model, ids = tiny(), tokens(48)
    with torch.no_grad():
        alone = model(ids).logits
    with attach(model, HASH):
        torch.testing.assert_close(in_pieces(model, ids, [40]), alone)
    with attach(model, HASH, budget=0.4) as run:
        model(ids, labels=ids).loss.backward()
    assert 0.1 < run.record.density("prefill") < 0.25
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)


def test_options_that_cannot_be():
    for changes, text in (
        ({"hashes": 0}, r"scatterbrain\.hashes=0: it takes 1 to 16"),
        ({"hashes": 17}, r"scatterbrain\.hashes=17: it takes 1 to 16"),
        ({"exact_share": 1.5}, r"scatterbrain\.exact_share=1\.5: it takes a share of the budget"),
    ):
        with pytest.raises(BadOption, match=text):
            Scatterbrain(**changes)
    with pytest.raises(CannotRun, match="the budget 4096B is in bytes"):
        attach(tiny(), HASH, budget="4KiB")
    assert "logits are capped at 30.0" in HASH.check(site(0.5, queries=8, keys=8, softcap=30.0))[0]
