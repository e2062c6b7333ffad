"""FlexPrefill against plain loops: the check of shapes, the shares that blocks hold, budgets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.errors import BadOption, CannotRun
from saccade.core.selection import Blocks
from saccade.methods.sparse.flexprefill import Flexprefill, distance
from tests.methods.handmade import assert_under_its_mask, noise, site, tiny

FEW = settings(max_examples=10)


def tensors(n, queries=None, scale=3.0):
    return scale * noise(1, 4, queries or n, 8, name="q").double(), noise(1, 2, n, 8, name="k").double()


def held(order, mass, gamma):
    """The shortest run of `order` that holds gamma."""
    out, total = [], 0.0
    for x in order:
        if total >= gamma:
            break
        out.append(x)
        total += mass[x]
    return out


def chosen(q, k, block, gamma, tau, least):
    """(block of queries, block of keys) of one head by the paper's algorithms, counted in blocks; n = all queries."""
    n, d = q.shape
    nb = -(-n // block)
    cut = [slice(i * block, (i + 1) * block) for i in range(nb)]
    last = q[-block:]
    logits = last @ k.T / math.sqrt(d)
    for i in range(len(last)):
        logits[i, n - len(last) + i + 1 :] = -torch.inf
    p = logits.softmax(-1) / len(last)
    columns = [float(p[:, c].sum()) for c in cut]
    diagonals = [0.0] * nb
    for i in range(len(last)):
        for j in range(n - len(last) + i + 1):
            diagonals[(n - len(last) + i - j) // block] += float(p[i, j])
    guess = torch.stack([last.mean(0) @ k[c].mean(0) for c in cut]).div(math.sqrt(d)).softmax(0)
    free = distance_by_hand(guess.tolist(), columns) < tau

    def lines(mass):
        order = [0, *sorted(range(1, nb), key=lambda j: -mass[j])]
        kept = [] if free else held(order, mass, gamma)
        return set(order[:least]) | set(kept)

    v, s = lines(columns), lines(diagonals)
    pairs = {(i, j) for i in range(nb) for j in range(i + 1) if j in v or i - j in s or i == j}
    if free:
        rows = {}
        for i in range(nb):
            x = torch.stack([q[cut[i]].mean(0) @ k[cut[j]].mean(0) for j in range(i + 1)]).div(math.sqrt(d)).softmax(0)
            rows |= {(i, j): float(x[j]) / nb for j in range(i + 1)}
        pairs |= set(held(sorted(rows, key=lambda x: -rows[x]), rows, gamma))
    return pairs


def distance_by_hand(p, q):
    def kl(x, y):
        return sum(a * math.log(a / b) for a, b in zip(x, y) if a > 0)

    m = [(a + b) / 2 for a, b in zip(p, q)]
    return math.sqrt(max(0.0, kl(p, m) / 2 + kl(q, m) / 2))


@FEW
@given(
    st.integers(1, 70), st.sampled_from([4, 8]), st.floats(0.3, 0.99), st.sampled_from([0.0, 0.2, 0.3, 1.0]),
    st.integers(1, 20),
)  # fmt: skip
def test_blocks_are_those_of_the_papers_algorithms(n, block, gamma, tau, least):
    (q, k), here = tensors(n), site(queries=n, keys=n)
    method = Flexprefill(gamma=gamma, tau=tau, block_tokens=block, least_tokens=least)
    table = method.select(q, k, here).table()
    for head in range(4):
        wanted = chosen(q[0, head], k[0, head // 2], block, gamma, tau, -(-least // block))
        assert {tuple(x) for x in table[0, head].nonzero().tolist()} == wanted


def test_the_distance_is_that_of_jensen_and_shannon():
    p, q = (noise(5, 9, name=name).double().softmax(-1) for name in "pq")
    wanted = [distance_by_hand(a, b) for a, b in zip(p.tolist(), q.tolist())]
    torch.testing.assert_close(distance(p, q), torch.tensor(wanted, dtype=torch.float64))
    assert distance(p, p).max() == 0
    one, other = torch.eye(2)
    assert distance(one, other) == pytest.approx(math.sqrt(math.log(2)))


def test_a_head_whose_keys_alike_fill_blocks_is_free_and_one_that_looks_at_a_single_key_is_lines():
    n = 64
    q, k = torch.zeros(1, 2, n, n), torch.zeros(1, 2, n, n)
    q[..., 0] = 20.0
    k[0, 0, 16:24, 0] = 2.0
    k[0, 1, 21, 0] = 5.0
    here = site(queries=n, keys=n, heads=2, scale=n**-0.5)
    table = Flexprefill(gamma=0.5, block_tokens=8, least_tokens=0).select(q, k, here).table()[0]
    assert table[1, 2:, 2].all()
    # of the whole map a row holds an eighth: rows whose best block holds most of them come first
    assert table[0, :, 2].tolist() == [False, False, True, True, True, True, False, False]


@FEW
@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.02, 1.0), st.sampled_from([0.0, 0.3]))
def test_a_layer_stays_within_the_budget_and_spends_it(n, queries, share, tau):
    queries = min(n, queries)
    here = site(share, queries=queries, keys=n)
    selection = Flexprefill(tau=tau).select(*tensors(n, queries), here)
    row = here.budget.row_tokens(n)
    allowed = 4 * sum(min(i + 1, row) for i in range(n - queries, n))
    mask = selection.mask()
    assert mask.diagonal(offset=n - queries, dim1=-2, dim2=-1).all()
    if isinstance(selection, Blocks):
        block = selection.q_block
        assert allowed - block * block < mask.sum() <= allowed or selection.table().all()


def test_heads_that_look_broadly_get_more():
    n = 512
    q, k = noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k")
    q[:, :2] *= 0.1
    q[:, 2:] *= 8
    density = Flexprefill(tau=0.0).select(q, k, site(0.3, queries=n, keys=n)).density()[0]
    assert density[:2].min() > density[2:].max()


def test_more_gamma_is_more():
    n = 300
    selections = [Flexprefill(gamma=g, least_tokens=0, block_tokens=8).select(*tensors(n), site(queries=n, keys=n))
                  for g in (0.0, 0.5, 0.9, 1.0)]  # fmt: skip
    low, *_ = sizes = [float(s.density().mean()) for s in selections]
    assert sizes == sorted(sizes) and low < sizes[2] < 1.0


def test_in_a_model_it_attends_under_its_mask():
    assert_under_its_mask(Flexprefill())


def test_what_cannot_run_is_refused():
    with pytest.raises(BadOption, match=r"flexprefill\.block_tokens=0: it takes at least 1"):
        Flexprefill(block_tokens=0)
    with pytest.raises(BadOption, match=r"flexprefill\.gamma=1\.5: it takes a number from 0 to 1\. The authors' is 0"):
        Flexprefill(gamma=1.5)
    with pytest.raises(BadOption, match=r"flexprefill\.tau=-1: it takes a number from 0 to 1\. The authors' is 0\.1"):
        Flexprefill(tau=-1)
    with pytest.raises(CannotRun, match=r"gamma=0\.9 computes as many pairs as it takes, and would ignore"):
        attach(tiny(), Flexprefill(gamma=0.9), budget=0.5)
