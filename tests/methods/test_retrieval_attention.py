"""RetrievalAttention against plain loops: what a query reads, from where, and what lies in host memory."""

from __future__ import annotations

import dataclasses
import importlib.util
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, far
from saccade.attach.compat import CACHE
from saccade.attach.store import Bucket, Store
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, CannotRun, DoesNotCompose
from saccade.core.selection import Gather
from saccade.core.site import Far, Seen
from saccade.methods.decode.retrieval_attention import RetrievalAttention
from tests.helpers import assert_close_as_torch
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens

SINKS, WINDOW = 4, 8
budgets = st.sampled_from(["1tok", "3tok", "12tok", "30tok", 0.1, 0.4, 0.8])


def reader(**changes):
    """With few keys on the device."""
    return RetrievalAttention(**{"sink_tokens": SINKS, "window_tokens": WINDOW, **changes})


def made(prompt, more, budget, **changes):
    """q, k of four heads over two, and the site and the stored keys of the last `more` queries after a prompt."""
    n = prompt + more
    q, k = noise(1, 4, n, 8, name="q").double(), noise(1, 2, n, 8, name="k").double()
    place = torch.arange(n, dtype=torch.int32).expand(1, 2, -1)
    method, whole = reader(**changes), site(budget, queries=0, keys=prompt)
    before = (x[:, :, :prompt] for x in (k, k, place[..., None]))
    seen = Seen(*(x if x.shape[-1] > 1 else x[..., 0] for x in before), q[:, :, :prompt])
    found = method.shelve(seen, whole)
    here = {"stage": "decode", "seen": n, "searched": lambda *_: None}
    if found is None:
        return method, q, k, {"keys": k}, site(budget, queries=more, keys=n, **here)
    first, (index,) = found
    count = index.keys.shape[1]
    there = Far(first, index, k[0, :, first : first + count], place[0, :, first : first + count])
    left = {"keys": torch.cat([k[:, :, :first], k[:, :, first + count :]], 2)}
    return method, q, k, left, site(budget, queries=more, keys=n, far=(there,), **here)


@given(st.integers(1, 40), st.integers(1, 12), budgets)
@settings(max_examples=40, deadline=None)
def test_a_query_reads_sinks_window_and_the_best_of_the_rest(prompt, more, budget):
    """However its keys are spread over device and host, under an exact index."""
    method, q, k, left, here = made(prompt, more, budget, search="flat")
    mask = method.select(q[:, :, prompt:], left, here).mask().expand(1, 4, -1, -1)
    for head in range(4):
        for i in range(more):
            end = prompt + i + 1
            count = Budget.of(budget).tokens(end)
            sinks = min(SINKS, count // 4)
            fixed = [*range(sinks), *range(end - min(WINDOW, max(1, count // 2)), end)]
            rest = [j for j in range(end) if j not in fixed]
            rest.sort(key=lambda j: -float(q[0, head, prompt + i] @ k[0, head // 2, j]))
            assert set(mask[0, head, i].nonzero()[:, 0].tolist()) == {*fixed, *rest[: count - len(fixed)]}


@given(st.integers(14, 90), st.integers(1, 12), budgets, st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_narrow_search_stays_within_the_budget(prompt, more, budget, beam):
    method, q, _, left, here = made(prompt, more, budget, beam_keys=beam, neighbours=2)
    read = method.select(q[:, :, prompt:], left, here)
    for i, row in enumerate(read.mask().sum(-1)[0].T):
        assert 0 < row.max() <= Budget.of(budget).tokens(prompt + i + 1)
    assert read.count().sum() == read.mask().sum(), "no key is listed twice"


@given(st.integers(13, 60), st.integers(2, 12), budgets, st.data())
@settings(max_examples=8, deadline=None)
def test_steps_equal_one_forward_whatever_a_search_misses(prompt, more, budget, data):
    cuts = data.draw(st.lists(st.integers(prompt + 1, prompt + more - 1), unique=True).map(sorted))
    model, ids = tiny(), tokens(prompt + more, 2)
    method = reader(beam_keys=2, neighbours=2, query_tokens=3)
    with attach(model, method, budget=budget):
        torch.testing.assert_close(in_pieces(model, ids, [prompt, *cuts]), in_pieces(model, ids, [prompt]))


# --- device and host --------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_attention_here_and_there_is_attention_over_both(first, count, new, rows, seed):
    """Any list and ranges, against the same pairs in one softmax."""
    n, m = first + count + new, min(3, new)
    q, k, v = (noise(rows, g, x, 8, name=f"{seed} {i}") for i, (g, x) in enumerate([(4, m), (2, n), (2, n)]))
    score = noise(rows, 4, m, n, name=f"{seed}").masked_fill(torch.arange(n) >= n - m, -torch.inf)
    values, index = score.topk(min(5, n), -1)
    index = index.masked_fill(values < 0, -1).int()
    end = torch.arange(n - m, n)[:, None] + 1
    ranges = torch.stack([end - 1, end], -1)[None, None].expand(rows, 4, -1, -1, -1).int()
    chosen = Gather(index=index, ranges=ranges, queries=m, keys=n)
    near = torch.cat([torch.arange(first), torch.arange(first + count, n)])
    middle = slice(first, first + count)
    there = [Far(first, mock.Mock(keys=a[:, middle]), b[:, middle], torch.zeros(2, count)) for a, b in zip(k, v)]
    out, lse = far.attend(q, {"keys": k[:, :, near], "values": v[:, :, near]}, there, chosen, scale=0.3, softcap=None)
    assert_close_as_torch(out, q, k, v, chosen.mask(), scale=0.3, lse=lse)


@pytest.mark.parametrize("search", ["graph", "flat"])
def test_the_device_holds_sinks_and_window_however_long_the_prompt(search):
    """Device and host are counted apart; nothing is lost; what is decoded stays on the device."""
    model, device, host = tiny(), [], []
    for n in (100, 200, 400):
        with attach(model, reader(search=search), budget=0.25) as run, torch.no_grad():
            cache = model(tokens(n), use_cache=True)[CACHE]
            record = run.record
            device.append(record.bytes_held - record.bytes_host)
            host.append(record.bytes_host)
            assert record.kept_fraction == 1 and record.layers[0].kept[0][1].tolist() == list(range(n))
            model(tokens(3), **{CACHE: cache})
            more = run.record.bytes_held - run.record.bytes_host
            assert run.record.bytes_host == host[-1] and more > device[-1]
            assert run.record.layers[1].kept[0][0].tolist() == list(range(n + 3))
    assert len(set(device)) == 1 and host == sorted(set(host))
    size = 2 * 2 * (2 * model.config.head_dim * 8 + 4)  # two layers, two heads, key and value, position
    assert device[0] - (SINKS + WINDOW) * size == 2 * 2 * 8, "and the numbers of the rows"
    assert host[-1] >= (400 - SINKS - WINDOW) * size


def test_at_a_full_budget_and_in_short_prompts_all_stays_on_the_device():
    model = tiny()
    for n, budget in ((100, 1.0), (SINKS + WINDOW, 0.5), (50, "50tok")):
        with attach(model, reader(), budget=budget) as run:
            in_pieces(model, tokens(n + 2), [n])
            assert run.record.bytes_host == 0 and run.record.visited_fraction == 1


def test_repeated_rows_share_what_lies_in_host_memory():
    model = tiny()
    with attach(model, reader(), budget=0.25) as run, torch.no_grad():
        cache = model(tokens(100), use_cache=True)[CACHE]
        before = run.record
        device, host = before.bytes_held - before.bytes_host, before.bytes_host
        cache.batch_repeat_interleave(3)
        assert run.record.bytes_host == host and run.record.bytes_held - host == 3 * device


def test_a_search_says_what_it_looked_at():
    model, shares = tiny(), {}
    for search, beam in (("flat", 1), ("graph", 1), ("graph", 40)):
        with attach(model, reader(search=search, beam_keys=beam, neighbours=4), budget="20tok") as run:
            in_pieces(model, tokens(410), [400])
            shares[search, beam] = run.record.visited_fraction
    assert shares["flat", 1] == 1 and shares["graph", 1] < shares["graph", 40] < 0.9


def test_before_a_forward_there_is_nothing_to_record():
    with attach(tiny(), reader(), budget=0.25) as run:
        assert run.record.layers == {} and run.record.visited_fraction == 1


def test_between_parts_of_a_prompt_a_layer_lies_in_host_memory():
    """Nothing moves in a test without a second device, so the moves are noted."""
    model, moves = tiny(), []
    plain = Store.move

    def move(self, device):
        moves.append((device.type, [b.length for b in self.buckets]))
        plain(self, device)

    with attach(model, reader(), budget=0.25) as run, mock.patch.object(Store, "move", move), torch.no_grad():
        cache = run.new_cache()
        with run.prompt():
            for part in tokens(100).split(60, dim=1):
                model(part, **{CACHE: cache})
    away = [lengths for _, lengths in moves]
    assert away == [[], [60]] * 2 + [[60], [100]] * 2 + [[100]] * 2, "here and there, layer by layer; and at the end"


def test_a_store_moves_all_it_holds():
    meta = torch.device("meta")
    store = Store(1, 2)
    store.buckets = [Bucket(torch.arange(2), torch.zeros(2, 3), {"keys": torch.zeros(2, 3, 4)})]
    store.move(meta)
    assert {t.device for t in store.tensors()} == {meta}


@pytest.mark.gpu
def test_on_a_gpu_the_middle_lies_in_pinned_host_memory():
    """And a prompt in parts, which moves there and back, gives what it gives at once."""
    model, ids = tiny().cuda(), tokens(104).cuda()
    with attach(model, reader(), budget=0.25) as run, torch.no_grad():
        at_once = in_pieces(model, ids, [100])
        cache = run.new_cache()
        with run.prompt():
            for part in ids[:, :100].split(40, dim=1):
                model(part, **{CACHE: cache})
                stored = cache.layers[0].store.tensors()
                assert {t.device.type for t in stored} == {"cpu"}
        for layer in cache.layers:
            held = far.tensors(layer.far[0])
            assert all(t.device.type == "cpu" and t.is_pinned() for t in held)
            assert {t.device.type for t in layer.store.tensors()} == {"cuda"}
        torch.testing.assert_close(model(ids[:, 100:], **{CACHE: cache}).logits, at_once[:, 100:])


# --- tokens taken back ------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(1, WINDOW + 5))
@settings(max_examples=8, deadline=None)
def test_tokens_taken_back_were_never_there_or_it_is_said(steps, crop):
    """Of the prompt, the window may go; what the index holds may not."""
    model, ids, other = tiny(), tokens(60 + steps), tokens(99)[:, -4:]
    with attach(model, reader(), budget=0.5), torch.no_grad():
        cache = model(ids[:, :60], use_cache=True)[CACHE]
        for i in range(60, 60 + steps):
            model(ids[:, i : i + 1], **{CACHE: cache})
        if crop > WINDOW + steps:
            text = (
                rf"take {crop} tokens back: only the last {WINDOW + steps} are on the device; those before lie in host"
                r" memory, under an index that was built once\. Take back fewer, or read the prompt again\."
            )
            with pytest.raises(CannotRun, match=text):
                cache.crop(-crop)
            return
        cache.crop(-crop)
        found = model(other, **{CACHE: cache}).logits
        if crop <= steps:
            straight = in_pieces(model, torch.cat([ids[:, : 60 + steps - crop], other], 1), [60])
            torch.testing.assert_close(found, straight[:, -4:])
    assert found.isfinite().all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_run_says_why():
    for name in ("window_tokens", "beam_keys", "probes", "neighbours", "query_tokens"):
        with pytest.raises(BadOption, match=rf"retrieval-attention\.{name}=0: it takes at least 1\. Leave it away"):
            RetrievalAttention(**{name: 0})
    kinds = " or ".join(repr(kind) for kind in ("graph", "graph-faiss", "hnsw", "ivf", "flat"))
    with pytest.raises(BadOption, match=f"search='tree': it takes {kinds}"):
        RetrievalAttention(search="tree")
    with pytest.raises(DoesNotCompose, match=r"'retrieval-attention' counts on all keys being there in every layer"):
        attach(tiny(), ["retrieval-attention", "snapkv"], budget=0.5)
    text = r"index='hnsw' needs faiss, which is not installed: pip install 'saccade\[retrieval\]'"
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        with pytest.raises(CannotRun, match=text):
            attach(tiny(), RetrievalAttention(search="hnsw"), budget=0.5)
        with attach(tiny(), RetrievalAttention(search="hnsw")):
            pass  # a full budget searches nothing


def test_options_reach_the_index():
    *_, here = made(90, 1, 0.3, beam_keys=7, neighbours=5)
    index = here.far[0].index
    assert index.beam == 7 and index.edges.shape[-1] == 6
    assert dataclasses.replace(index, beam=3).beam == 3
