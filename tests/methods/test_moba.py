"""MoBA against plain loops: which blocks a query picks, what it costs, and that a net is trained and read with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.core.errors import BadOption
from saccade.core.selection import Spans
from saccade.methods.nets import LanguageModel
from saccade.methods.sparse.moba import Moba
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask
from tests.mixers import assert_as_good

FEW = settings(max_examples=12)


def tensors(n, queries=None):
    return noise(2, 4, queries or n, 8, name="q").double(), noise(2, 2, n, 8, name="k").double()


@FEW
@given(st.integers(2, 60), st.integers(1, 60), st.floats(0.05, 0.9), st.integers(1, 5))
def test_every_query_sees_its_own_block_and_those_of_largest_gate(n, queries, share, top):
    queries = min(n, queries)
    (q, k), here = tensors(n, queries), site(share, queries=queries, keys=n)
    selection = Moba(top_blocks=top).select(q, k, here)
    row = here.budget.row_tokens(n)
    if row == n:
        assert isinstance(selection, Spans)
        return
    mask, k_used = selection.mask().expand(2, 4, -1, -1), min(top, row)
    block = row // k_used
    assert mask.sum(-1).max() <= row
    for head in (0, 3):
        for t in range(queries):
            at = n - queries + t
            own = at // block
            gate = [float(q[1, head, t] @ k[1, head // 2, i * block : (i + 1) * block].mean(0)) for i in range(own)]
            kept = {own, *sorted(range(own), key=lambda i: -gate[i])[: k_used - 1]}
            wanted = [j // block in kept and j <= at for j in range(n)]
            assert mask[1, head, t].tolist() == wanted
    assert torch.equal(selection.count().expand(2, 4).long(), mask.sum((-2, -1)))


def test_most_of_the_budget_is_spent_the_more_the_finer_the_blocks():
    here, given_tensors = site(0.25, queries=1024, keys=1024), tensors(1024)
    densities = [float(Moba(top_blocks=k).select(*given_tensors, here).density().mean()) for k in (1, 3, 8)]
    assert densities == sorted(densities) and 0.2 < densities[1] <= 0.25


def test_a_model_reads_a_prompt_under_its_mask_and_decodes_dense():
    model, ids, n = tiny(), tokens(90), 80
    with attach(model, "moba", budget=0.3) as run:
        found = in_pieces(model, ids, [n])
    assert 0.2 < run.record.density("prefill") <= 0.3 and run.record.density("decode") == 1

    def mask(layer, q, k):
        here = site(0.3, queries=n, keys=n, layer=layer)
        first = Moba().select(q[:, :, :n], k[:, :, :n], here).mask().expand(1, 4, n, n)
        allowed = torch.ones(1, 4, 90, 90, dtype=torch.bool)
        allowed[:, :, :n] = torch.nn.functional.pad(first, (0, 90 - n))
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_chunks_of_a_prompt_agree_with_one_pass_under_a_budget_in_tokens():
    model, ids, out = tiny(), tokens(60), []
    with attach(model, "moba", budget="12tok") as run, torch.no_grad():
        whole, cache = model(ids).logits, run.new_cache()
        with run.prompt():
            out = [model(part, **{CACHE: cache}).logits for part in ids.split([20, 7, 33], 1)]
    torch.testing.assert_close(torch.cat(out, 1), whole)


def test_a_net_is_trained_with_it_and_reads_in_pieces_and_by_steps():
    net = LanguageModel(32, channels=16, heads=4, layers=2, mixer="moba", budget="6tok").double()
    ids = torch.randint(0, 32, (2, 23), generator=torch.Generator().manual_seed(3))
    whole, _ = net(ids)
    assert net.blocks[0].mixer.last.density().max() < 0.5
    first, state = net(ids[:, :9])
    second, state = net(ids[:, 9:22], state)
    last, _ = net.step(ids[:, 22], state)
    assert_as_good(torch.cat([first, second, last[:, None]], 1), whole, "moba")
    whole.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_not_even_the_own_block_is_refused():
    with pytest.raises(BadOption, match=r"moba\.top_blocks=0: a query sees its own block\. Give 1, or leave it away"):
        Moba(top_blocks=0)
