"""Quest against its equation in plain loops, its bounds against those of all keys, and a dense pass under its pages."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.attach.store import SPARE
from saccade.core.budget import Budget
from saccade.core.errors import BadBudget, BadOption, CannotRun
from saccade.methods.decode.quest import Quest
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

BUDGETS = ["1tok", "7tok", "20tok", 0.1, 0.3, 0.8, 1.0]


def reader(**changes):
    return Quest(**{"dense_layers": 0, "page_tokens": 4, **changes})


def chosen(q, k, count, page):
    """Keys that one query reads, of those up to its own: q [s d] of the heads that choose together, k [n d]."""
    n, start = len(k), (len(k) - 1) // page * page
    if count <= n - start:
        return set(range(n - count, n))
    bound = []
    for first in range(0, start, page):
        low, high = k[first : first + page].min(0).values, k[first : first + page].max(0).values
        bound.append(max(float(torch.maximum(one * low, one * high).sum()) for one in q))
    best = sorted(range(len(bound)), key=lambda p: -bound[p])[: (count - (n - start)) // page]
    return {p * page + i for p in best for i in range(page)} | set(range(start, n))


def expected(q, k, counts, page, together):
    """[h q n] by plain loops; q [h q d], k [g n d]."""
    (h, queries, _), (g, n, _) = q.shape, k.shape
    out = torch.zeros(h, queries, n, dtype=torch.bool)
    for head in range(h):
        kv = head // (h // g)
        some = range(kv * (h // g), (kv + 1) * (h // g)) if together else [head]
        for row in range(queries):
            seen = n - queries + row + 1
            keys = chosen(q[list(some), row].double(), k[kv, :seen].double(), counts[row], page)
            out[head, row, list(keys)] = True
    return out


def stored(k):
    positions = torch.arange(k.shape[2], dtype=torch.int32).expand(*k.shape[:2], -1)
    return {"keys": k, "values": k, "positions": positions}


@given(st.integers(1, 45), st.integers(1, 6), st.integers(1, 9), st.sampled_from(BUDGETS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_pages_of_largest_bound_are_read_and_the_newest(n, queries, page, budget, together):
    queries = min(queries, n)
    q, k = noise(2, 4, queries, 8, name="q"), noise(2, 2, n, 8, name="k")
    method = reader(page_tokens=page, group="max" if together else "per-head")
    here = site(budget, queries=queries, keys=n, stage="decode")
    mask = method.select(q, stored(k), here).mask().expand(2, 4, queries, n)
    counts = [Budget.of(budget).tokens(seen) for seen in range(n - queries + 1, n + 1)]
    for row in range(2):
        assert torch.equal(mask[row], expected(q[row], k[row], counts, page, together))


@given(st.integers(2, 60), st.sampled_from(["2tok", 0.2, 0.5]), st.sampled_from([1, 3, 16]))
@settings(max_examples=40, deadline=None)
def test_no_key_left_out_has_a_larger_logit_than_the_worst_bound_that_was_read(n, budget, page):
    """What the bound is for: where a page is passed over, no key of it could beat the bounds of those read."""
    q, k = noise(1, 2, 1, 8, name="q"), noise(1, 2, n, 8, name="k")
    method = reader(page_tokens=page)
    mask = method.select(q, stored(k), site(budget, queries=1, keys=n, stage="decode", heads=2)).mask()
    scores = ops.page_scores(q.double(), *ops.page_bounds(k.double(), page))
    logits = (q.double() @ k.double().mT)[0, :, 0]
    for head in range(2):
        read = mask.expand(1, 2, 1, n)[0, head, 0]
        pages = {int(i) // page for i in read.nonzero()[:, 0]} - {(n - 1) // page}
        if pages:
            worst = min(float(scores[0, head, 0, p]) for p in pages)
            left = logits[head, : (n - 1) // page * page][~read[: (n - 1) // page * page]]
            assert (left <= worst).all()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_bounds_are_those_of_all_keys_whatever_came_between(data):
    """Tokens come, are taken back, and are dropped in the middle: what is remembered never differs from a new look."""
    method, state = reader(), {}
    names = iter(range(1000))
    k = noise(1, 2, 9, 8)
    positions, ahead = torch.arange(9, dtype=torch.int32), 9
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["come", "come", "take back", "drop"]))
        if what == "take back":
            left = data.draw(st.integers(1, k.shape[2]))
            k, positions = k[:, :, :left], positions[:left]
            ahead = int(positions[-1]) + 1
        if what == "drop":
            stays = torch.tensor(data.draw(st.lists(st.booleans(), min_size=k.shape[2], max_size=k.shape[2])))
            stays[-1] = True
            k, positions = k[:, :, stays], positions[stays]
        new = data.draw(st.integers(1, 9))
        k = torch.cat([k, noise(1, 2, new, 8, name=f"k{next(names)}")], 2)
        positions = torch.cat([positions, torch.arange(ahead, ahead + new, dtype=torch.int32)])
        ahead += new
        here = site("5tok", queries=new, keys=k.shape[2], stage="decode", state=state)
        there = {"keys": k, "values": k, "positions": positions.expand(1, 2, -1)}
        method.select(noise(1, 4, new, 8), there, here)
        whole = k.shape[2] // 4 * 4
        if state:
            low, high = ops.page_bounds(k[:, :, :whole], 4) if whole else (k[:, :, :0], k[:, :, :0])
            assert torch.equal(state["low"], low) and torch.equal(state["high"], high)


def test_a_step_looks_only_at_keys_that_are_new_in_a_full_page():
    """The prompt's keys once, then a page each time one is full."""
    model, ids, looked = tiny(), tokens(60), []
    plain = ops.page_bounds

    def listening(k, page_tokens):
        looked.append(k.shape[2])
        return plain(k, page_tokens)

    with attach(model, reader(), budget=0.5), mock.patch.object(ops, "page_bounds", listening):
        in_pieces(model, ids, list(range(40, 60)))
    assert looked == [40, 40, *[4] * 10]  # two layers: all that is there at the first step, then every fourth


@pytest.mark.parametrize("group", ["max", "per-head"])
def test_decoding_is_dense_attention_over_the_pages(group):
    model, ids, n, prompt = tiny(layers=3), tokens(70), 70, 50
    method = reader(dense_layers=1, group=group)
    with attach(model, method, budget=0.6) as run:
        found = in_pieces(model, ids, [prompt, prompt + 1, prompt + 9])
        assert run.record.density("decode") <= 0.6

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, n, n, dtype=torch.bool)
        counts = [Budget.of(0.6).layer_tokens(seen, layer, 3, 1) for seen in range(prompt + 1, n + 1)]
        allowed[0, :, prompt:] = expected(q[0, :, prompt:], k[0], counts, 4, group == "max")
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


@pytest.mark.parametrize("evictor", ["snapkv", "streaming"])
def test_pages_are_of_what_an_eviction_left(evictor):
    """Also where it goes on dropping keys, which moves the others to other pages."""
    model, ids = tiny(), tokens(60)
    with attach(model, [evictor, reader()], budget=0.5):
        found = in_pieces(model, ids, list(range(40, 60)))
    forgetful = mock.patch.object(Quest, "_remembered", lambda *_: 0)
    with forgetful, attach(model, [evictor, reader()], budget=0.5):
        assert torch.equal(in_pieces(model, ids, list(range(40, 60))), found)


def test_what_is_remembered_is_two_keys_for_each_page():
    model, ids = tiny(), tokens(64)
    with attach(model, reader(), budget=0.5), torch.no_grad():
        cache = model(ids[:, :47], use_cache=True)[CACHE]
        before = [layer.bytes_held() for layer in cache.layers]
        model(ids[:, 47:48], **{CACHE: cache})
        after = [layer.bytes_held() for layer in cache.layers]
    token, pages = 2 * 2 * 16 * 8 + 2 * 4, 48 // 4  # two heads of 16 in float64, with an int32 position
    grown = token * (1 + 47 // SPARE)
    assert [b - a - grown for a, b in zip(before, after)] == [pages * 2 * (2 * 16 * 8 + 4)] * 2


def test_full_budget_is_dense():
    model, ids = tiny(), tokens(50)
    with attach(model, Quest(dense_layers=1), budget=1.0):
        found = in_pieces(model, ids, [30, 31])
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits)


def test_what_cannot_run_says_why():
    with pytest.raises(BadOption, match=r"quest\.page_tokens=0: a page has one key or more\. Give at least 1"):
        Quest(page_tokens=0)
    with pytest.raises(CannotRun, match=r"dense_layers=2 of 2 layers alone exceed budget=0\.5"):
        attach(tiny(), "quest", budget=0.5)


def test_a_budget_in_tokens_below_the_dense_layers_is_said_while_reading():
    model = tiny()
    with attach(model, reader(dense_layers=1), budget="5tok"), pytest.raises(BadBudget, match=r"leave less than one"):
        in_pieces(model, tokens(24), [20])
