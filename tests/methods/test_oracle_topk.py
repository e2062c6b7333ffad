"""The oracle reads the best keys, as many as allowed, chunked or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import ops
from saccade.attach import attach
from saccade.core.errors import CannotRun
from saccade.core.selection import causal_mask, dense
from saccade.methods.sparse import oracle_topk
from saccade.methods.sparse.oracle_topk import OracleTopk
from saccade.methods.sparse.random import Random
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask


def logits(q, k):
    every = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1))
    return every.masked_fill(~causal_mask(q.shape[2], k.shape[2]), -torch.inf)


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.02, 1.0), st.sampled_from(["prefill", "decode"]))
def test_no_key_left_out_beats_one_that_is_read(n, queries, share, stage):
    queries = n if stage == "prefill" else min(queries, n)
    q, k, here = noise(2, 4, queries, 8), noise(2, 2, n, 8), site(share, queries=queries, keys=n, stage=stage)
    mask, every = OracleTopk().select(q, k, here).mask().expand(2, 4, -1, -1), logits(q, k)
    left = every.masked_fill(mask, -torch.inf).amax(-1)
    assert (left <= every.masked_fill(~mask, torch.inf).amin(-1)).all()
    for i in range(queries):
        there = n - queries + i + 1
        most = here.budget.row_tokens(n) if stage == "prefill" else here.budget.tokens(there)
        assert (mask[:, :, i].sum(-1) == min(there, most)).all()


def test_chunks_of_rows_change_nothing(monkeypatch):
    q, k, here = noise(1, 4, 40, 8), noise(1, 2, 40, 8), site(0.3, queries=40, keys=40)
    whole = OracleTopk().select(q, k, here).mask()
    monkeypatch.setattr(oracle_topk, "_PAIRS", 4 * 40 * 7)
    assert torch.equal(OracleTopk().select(q, k, here).mask(), whole)


@given(st.integers(64, 200), st.floats(0.1, 0.8))
def test_it_keeps_more_attention_than_chance(n, share):
    q, k, here = noise(1, 4, n, 8), noise(1, 2, n, 8), site(share, queries=n, keys=n)
    whole, best, chance = (
        ops.attend(q, k, k, s)[1] for s in
        (dense(n, n), OracleTopk().select(q, k, here), Random(part="prefill").select(q, k, here))
    )  # fmt: skip
    assert torch.exp(best - whole).mean() > torch.exp(chance - whole).mean()


def test_in_a_model_prefill_and_decoding_are_under_its_mask():
    model, ids, n = tiny(), tokens(60), 40
    with attach(model, "oracle-topk", budget=0.4) as run:
        found = in_pieces(model, ids, [n, n + 7])
    assert run.record.density("prefill") <= 0.4 and run.record.density("decode") <= 0.4

    def mask(layer, q, k):
        first = OracleTopk().select(q[:, :, :n], k[:, :, :n], site(0.4, queries=n, keys=n)).mask()
        rest = OracleTopk().select(q[:, :, n:], k, site(0.4, queries=60 - n, keys=60, stage="decode")).mask()
        return torch.cat([torch.nn.functional.pad(first, (0, 60 - n)), rest], 2)

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_a_budget_in_bytes_is_refused():
    with pytest.raises(CannotRun, match="it leaves out pairs, not memory, and the budget 4096B is in bytes"):
        attach(tiny(), "oracle-topk", budget="4KiB")
