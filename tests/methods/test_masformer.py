"""MASFormer: which layers are full, and which keys a block sees, by plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from saccade.methods.nets import LanguageModel
from saccade.methods.sparse.masformer import Masformer, _block
from tests.methods.handmade import noise, site
from tests.mixers import assert_as_good

USUAL = Masformer()


def chosen(n, budget, queries=None, method=USUAL, **changes):
    here = site(budget, queries=queries or n, keys=n, **changes)
    return method.select(noise(1, 4, here.queries, 8), noise(1, 2, n, 8), here)


@given(n=st.integers(1, 300), tokens=st.integers(1, 300), queries=st.integers(1, 300))
def test_a_block_sees_itself_and_the_one_before(n, tokens, queries):
    """Rows of a later piece see what they see in one pass, and none reads more than it may."""
    queries = min(queries, n)
    selection = chosen(n, f"{tokens}tok", queries)
    mask, b = selection.mask()[0, 0], _block(tokens)
    for row, t in enumerate(range(n - queries, n)):
        first = 0 if tokens >= n else t if tokens == 1 else max(0, (t // b - 1) * b)
        assert mask[row].nonzero()[:, 0].tolist() == list(range(first, t + 1))
    assert int(mask.sum(-1).max()) <= tokens
    assert int(selection.count().max()) == int(mask.sum())


@example(n=33, queries=6, share=0.75, full=1)
@given(n=st.integers(2, 120), queries=st.integers(1, 20), share=st.floats(0.05, 1.0), full=st.integers(0, 2))
def test_after_a_prompt_one_forward_reads_what_steps_read(n, queries, share, full):
    """Of a fraction, which is of the tokens so far."""
    queries, method = min(queries, n - 1), Masformer(full_layers=full)
    at_once = chosen(n, share, queries, method=method).mask()[0, 0]
    for row, end in zip(at_once, range(n - queries + 1, n + 1)):
        assert torch.equal(row[:end], chosen(end, share, 1, method=method).mask()[0, 0, 0]) and not row[end:].any()


@given(rows=st.integers(2, 9999))
def test_two_blocks_are_what_a_row_may_read_and_most_of_it(rows):
    assert rows / 4 < 2 * _block(rows) <= rows


@example(n=8, share=0.3125, layers=7, full=1)
@given(n=st.integers(8, 300), share=st.floats(0.05, 1.0), layers=st.integers(1, 12), full=st.integers(0, 12))
def test_all_layers_together_stay_within_a_fraction(n, share, layers, full):
    method = Masformer(full_layers=full)
    each = [chosen(n, share, method=method, layer=i, layers=layers).density().mean() for i in range(layers)]
    assert sum(each) / layers <= max(share, 2 / (n + 1)) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("placement", "where"), [("bottom", [0, 1]), ("top", [6, 7]), ("even", [0, 4])], ids=["bottom", "top", "even"]
)
def test_full_layers_are_where_they_are_said_to_be(placement, where):
    method = Masformer(full_layers=2, placement=placement)
    dense = [chosen(64, 0.5, method=method, layer=i, layers=8).density().min() == 1 for i in range(8)]
    assert [i for i, full in enumerate(dense) if full] == where
    few = [chosen(64, 0.25, method=method, layer=i, layers=8).density().min() == 1 for i in range(8)]
    assert sum(few) == 1, "half of the budget pays for one"


def test_a_net_trained_so_reads_by_steps_what_it_reads_at_once():
    net = LanguageModel(32, mixer="masformer", budget="8tok", channels=16, layers=2).double()
    ids = torch.arange(40)[None] * 7 % 32
    whole, _ = net(ids)
    first, state = net(ids[:, :19])
    later, state = net(ids[:, 19:38], state)
    steps = []
    for t in (38, 39):
        logits, state = net.step(ids[:, t], state)
        steps.append(logits[:, None])
    assert_as_good(torch.cat([first, later, *steps], 1), whole, "masformer")
