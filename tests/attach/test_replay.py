"""Steps that a graph repeats: what they read, what is counted, what ends a graph, and what is refused.

On a CPU the work is done anew in the place of a graph, which shows what a step reads and writes; the graphs themselves
are tested on a GPU.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saccade
from saccade import attach
from saccade.attach import replay
from saccade.attach.compat import CACHE
from saccade.core.errors import CannotRun
from saccade.methods.cache.kivi import Kivi
from saccade.methods.cache.streaming import Streaming
from saccade.methods.decode.quest import Quest
from saccade.methods.decode.retrieval_attention import RetrievalAttention
from tests.methods.handmade import in_pieces, site, tiny, tokens, under_mask

PROMPT = 40
# most of whose keys lie in host memory; the beam is as wide as there are keys, so that it finds the best
SEARCHER = RetrievalAttention(sink_tokens=2, window_tokens=8, beam_keys=PROMPT)
SAME = [("full", 1.0), ("snapkv", 0.4), ("adakv", 0.4), (["minference", "snapkv"], 0.5), (Quest(), 1.0)]


class Again:
    """In the place of a graph."""

    def __init__(self, work, warm):
        self.replay = work
        for _ in range(1 + warm):  # as a capture runs what is captured, on the host
            work()


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(replay.Replayer, "graph", Again)
    monkeypatch.setattr(replay, "devices", lambda model: ["cuda:0"])


def one_by_one(model, ids):
    return in_pieces(model, ids, list(range(PROMPT, ids.shape[1])))


def frozen_at(position: int, graph_tokens: int) -> int:
    """How many tokens are stored, and not beside, when that token reads: itself among them in the first step."""
    return PROMPT + 1 + max(0, position - PROMPT - 1) // graph_tokens * graph_tokens


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("methods", "budget"), SAME, ids=[str(m) for m, _ in SAME])
@given(graph_tokens=st.integers(1, 6), rows=st.integers(1, 2))
@settings(max_examples=3, deadline=None)
def test_nothing_changes_where_all_that_is_stored_is_read(methods, budget, graph_tokens, rows):
    model, ids = tiny(), tokens(PROMPT + 12, rows)
    found = []
    for each in (0, graph_tokens):
        with attach(model, methods, budget=budget, graph_tokens=each) as run:
            logits = one_by_one(model, ids)
            found.append((logits, run.record.table()))
    torch.testing.assert_close(found[1][0], found[0][0])
    for before, after in zip(found[0][1], found[1][1]):
        same = ("seen", "kept_fraction", "decode_density")
        assert {n: before[n] for n in same} == {n: after[n] for n in same}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("method", [Quest(page_tokens=4, dense_layers=0), SEARCHER], ids=lambda x: x.card.name)
@given(graph_tokens=st.integers(1, 9))
@settings(max_examples=4, deadline=None)
def test_a_reader_chooses_among_what_is_stored_and_reads_the_rest(method, graph_tokens):
    model, ids = tiny(), tokens(PROMPT + 20)

    def reads(layer, q, k):
        mask = torch.ones(1, q.shape[1], ids.shape[1], ids.shape[1], dtype=torch.bool)
        for t in range(PROMPT, ids.shape[1]):
            n = frozen_at(t, graph_tokens)
            where = site(0.4, queries=1, keys=n, layer=layer, stage="decode", heads=q.shape[1], kv_heads=k.shape[1])
            stored = {"keys": k[:, :, :n], "positions": torch.arange(n).expand(1, k.shape[1], -1)}
            mask[:, :, t, :n] = method.select(q[:, :, t : t + 1], stored, where).mask()[:, :, 0]
        return mask

    want = under_mask(model, ids, reads)
    with attach(model, method, budget=0.4, graph_tokens=graph_tokens):
        torch.testing.assert_close(one_by_one(model, ids), want)


@pytest.mark.usefixtures("on_cpu")
@given(graph_tokens=st.integers(1, 6))
@settings(max_examples=3, deadline=None)
def test_searches_of_repeated_steps_are_counted(graph_tokens):
    """Every one of them, over the same keys; on the CPU, and as a device counts them."""
    model, ids, found = tiny(), tokens(PROMPT + 12), []
    for each in (0, graph_tokens):
        with attach(model, SEARCHER, budget=0.4, graph_tokens=each) as run:
            one_by_one(model, ids)
            found.append([(x.keys_searched, x.keys_visited) for x in run.record.layers.values()])
    searched = 12 * 4 * (PROMPT - SEARCHER.sink_tokens - SEARCHER.window_tokens)
    assert found[0] == found[1] == [(searched, searched)] * 2, "a beam as wide looks at all keys"


@pytest.mark.usefixtures("on_cpu")
@given(graph_tokens=st.integers(1, 9))
@settings(max_examples=4, deadline=None)
def test_a_window_moves_when_tokens_are_put_away(graph_tokens):
    model, ids, method = tiny(), tokens(PROMPT + 20), Streaming(sink_tokens=2)
    budget, recent = "10tok", 8

    def reads(layer, q, k):
        at = torch.arange(ids.shape[1])
        ends = torch.tensor([t if t < PROMPT else frozen_at(t, graph_tokens) - 1 for t in at.tolist()])
        moved = ends + (ends < at)  # what is stored is what the token behind it may see
        near = (at >= moved[:, None] - recent) | (at < 2)
        return near[None, None].expand(1, q.shape[1], -1, -1)

    want = under_mask(model, ids, reads)
    with attach(model, method, budget=budget, graph_tokens=graph_tokens):
        torch.testing.assert_close(one_by_one(model, ids), want)


@pytest.mark.usefixtures("on_cpu")
def test_tokens_are_put_away_before_the_cache_is_changed():
    model, ids = tiny(), tokens(PROMPT, 2)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}):
        with attach(model, "snapkv", budget=0.5):
            want = model.generate(ids, **options, **more)
        with attach(model, "snapkv", budget=0.5, graph_tokens=4):
            assert torch.equal(model.generate(ids, **options, **more), want)
    with attach(model, "full", graph_tokens=8), torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
        for _ in range(4):
            model(ids[:, :1], **{CACHE: cache})
        assert cache.layers[0].tail.count == 3  # the first of them was an ordinary step
        cache.crop(-2)
        assert cache.layers[0].tail is None and cache.layers[0].store.seen == [PROMPT + 2] * 2


@pytest.mark.usefixtures("on_cpu")
def test_packed_tokens_and_those_beside_them():
    model, ids = tiny(), tokens(PROMPT + 12)
    packer = Kivi(group_tokens=8, group_channels=4, residual_tokens=8, bits=4)
    with attach(model, packer, graph_tokens=5) as run:
        found = one_by_one(model, ids)
        held = run.record.bytes_held
    with attach(model, "full") as run:
        far = (found - one_by_one(model, ids)).abs().max()
    assert held < run.record.bytes_held and 0 < far < 0.1 * found.std()


@pytest.mark.usefixtures("on_cpu")
def test_results_are_the_callers_own_and_the_model_is_left_as_it_was():
    model, ids = tiny(), tokens(PROMPT)
    with attach(model, "full", graph_tokens=8), torch.no_grad():
        assert "position_ids" in inspect.signature(model.forward).parameters  # `generate` looks there
        cache = model(ids, use_cache=True)[CACHE]
        outs = [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(5)]
        assert model.forward.replays == 4 and model.forward.captures == 1
        assert len({x.data_ptr() for x in outs}) == 5
    assert "forward" not in model.__dict__


@pytest.mark.usefixtures("on_cpu")
def test_who_gains_nothing_is_told():
    model, ids = tiny(), tokens(PROMPT)
    with attach(model, "full", graph_tokens=8):
        cache = model(ids, use_cache=True)[CACHE]
        with pytest.warns(UserWarning, match=r"full: steps that keep gradients .* torch\.no_grad"):
            model(ids[:, :1], **{CACHE: cache})
    with attach(model, "full", graph_tokens=1), pytest.warns(UserWarning, match="16 steps were captured for 15"):
        model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)


REFUSED = [
    ("h2o", "h2o decides after every token what goes"),
    ("recycled-attention", "recycled-attention does not do the same in every step"),
    ("retrieval-attention:search=flat", "retrieval-attention does not do the same in every step, or asks the host"),
    ("retrieval-head", "retrieval-head looks on at every step"),
]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("name", "why"), REFUSED)
def test_what_no_graph_could_do_is_refused(name, why):
    with pytest.raises(CannotRun, match=why):
        attach(tiny(), name, graph_tokens=8)


@pytest.mark.usefixtures("on_cpu")
def test_a_graph_serves_some_tokens_in_one_process():
    with pytest.raises(CannotRun, match="graph_tokens=-1: a graph serves one token or more"):
        attach(tiny(), "full", graph_tokens=-1)
    (why,) = replay.why_not(tiny(), {}, 8, shared=True)
    assert why.startswith("processes share this model or its texts")


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(CannotRun, match="its weights are on cpu, and graphs are of one CUDA device"):
        attach(tiny(), "full", graph_tokens=8)


@pytest.mark.usefixtures("on_cpu")
def test_what_a_step_may_not_be_given():
    model, ids = tiny(), tokens(PROMPT, 2)
    real = torch.ones_like(ids)
    real[0, :5] = 0
    with attach(model, "full", graph_tokens=8), torch.no_grad():
        cache = model(ids, use_cache=True, attention_mask=real)[CACHE]
        mask = torch.cat([real, real[:, -1:]], 1)
        with pytest.raises(CannotRun, match="it was given no position_ids"):
            model(ids[:, :1], attention_mask=mask, **{CACHE: cache})
        mask[0, -1] = 0
        with pytest.raises(CannotRun, match="a sequence gets no token in this step"):
            model(ids[:, :1], attention_mask=mask, position_ids=ids[:, :1], **{CACHE: cache})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("methods", "budget"),
    [*SAME, ("streaming", "20tok"), (Quest(dense_layers=0), 0.4), (SEARCHER, 0.4)],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("rows", [1, 3])
def test_graphs_do_what_is_done_without_them(methods, budget, rows, monkeypatch):
    model = saccade.models.tiny("llama", layers=3).cuda()
    ids = tokens(PROMPT + 30, rows).cuda()
    with attach(model, methods, budget=budget, graph_tokens=8):
        found = one_by_one(model, ids)
    monkeypatch.setattr(replay.Replayer, "graph", Again)
    with attach(model, methods, budget=budget, graph_tokens=8):
        torch.testing.assert_close(one_by_one(model, ids), found)
