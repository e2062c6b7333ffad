"""XAttention against plain loops: blocks that hold a share of each row, budgets, lines that antidiagonals meet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.core.errors import BadOption, CannotRun
from saccade.core.selection import Blocks
from saccade.methods.sparse.xattention import Xattention
from tests.methods.handmade import assert_under_its_mask, noise, site, tiny
from tests.ops.test_antidiagonal_mass import by_hand

FEW = settings(max_examples=10)


def tensors(n, queries=None, scale=3.0):
    return scale * noise(1, 4, queries or n, 8, name="q").double(), noise(1, 2, n, 8, name="k").double()


@FEW
@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from([(4, 2), (8, 4), (4, 4)]), st.floats(0.3, 0.99))
def test_each_row_takes_its_largest_blocks_until_they_hold_the_share(n, queries, sizes, threshold):
    queries, (block, stride) = min(n, queries), sizes
    q, k = tensors(n, queries)
    method = Xattention(threshold=threshold, block_tokens=block, stride=stride)
    table = method.select(q, k, site(queries=queries, keys=n)).table()
    for head in range(4):
        mass = by_hand(q[0, head], k[0, head // 2], block, stride, 8**-0.5, None)
        for i, row in enumerate(mass.tolist()):
            own, last = (n - queries + i * block) // block, (min(n, n - queries + (i + 1) * block) - 1) // block
            kept = {0, *range(own, last + 1)}
            for j in sorted(set(range(last + 1)) - kept, key=lambda j: -row[j]):
                if sum(row[x] for x in kept) < threshold:
                    kept.add(j)
            assert set(table[0, head, i].nonzero()[:, 0].tolist()) == kept


@FEW
@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.02, 1.0), st.sampled_from([4, 8]))
def test_a_layer_stays_within_the_budget_and_spends_it(n, queries, share, stride):
    queries = min(n, queries)
    here = site(share, queries=queries, keys=n)
    selection = Xattention(stride=stride).select(*tensors(n, queries), here)
    row = here.budget.row_tokens(n)
    allowed = 4 * sum(min(i + 1, row) for i in range(n - queries, n))
    mask = selection.mask()
    assert mask.diagonal(offset=n - queries, dim1=-2, dim2=-1).all()
    if isinstance(selection, Blocks):
        assert allowed - selection.q_block**2 < mask.sum() <= allowed


@pytest.mark.parametrize("stride", [8, 16])
def test_a_column_is_found_wherever_it_lies(stride):
    n, method = 256, Xattention(stride=stride, block_tokens=16, threshold=0.5)
    here = site(queries=n, keys=n, heads=1, kv_heads=1, scale=1.0)
    for line in range(100, 100 + stride, 3):
        q, k = torch.zeros(1, 1, n, 1), torch.zeros(1, 1, n, 1)
        q[:], k[:, :, line] = 30.0, 30.0
        table = method.select(q, k, here).table()[0, 0]
        assert table[line // 16 + 1 :, line // 16].all() and table[11:, 1 : line // 16].sum() == 0


def test_rows_and_heads_that_look_broadly_get_more():
    n = 512
    q, k = noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k")
    q[:, :2] *= 0.1
    q[:, 2:] *= 20
    density = Xattention().select(q, k, site(0.3, queries=n, keys=n)).density()[0]
    assert density[:2].min() > density[2:].max()


def test_in_a_model_it_attends_under_its_mask():
    assert_under_its_mask(Xattention())


def test_what_cannot_run_is_refused():
    with pytest.raises(BadOption, match=r"xattention\.block_tokens=0: it takes at least 1"):
        Xattention(block_tokens=0)
    with pytest.raises(BadOption, match=r"xattention\.stride=12: it takes a divisor of block_tokens=128\. The"):
        Xattention(stride=12)
    with pytest.raises(BadOption, match=r"xattention\.threshold=1\.5: it takes a number from 0 to 1\. The authors' is"):
        Xattention(threshold=1.5)
    with pytest.raises(CannotRun, match=r"threshold=0\.9 computes as many pairs as it takes, and would ignore the"):
        attach(tiny(), Xattention(threshold=0.9), budget=0.5)
