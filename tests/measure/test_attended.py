"""The map that a method attends to, against loops over single pairs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

import saccade
from saccade.attach.calibration import Subject
from saccade.attach.compat import CACHE
from saccade.attach.probe import probe
from saccade.core.budget import Budget
from saccade.core.errors import BadInput, CannotRun
from saccade.core.selection import causal_mask
from saccade.core.site import Site
from saccade.measure import attended as maps
from saccade.measure.attended import CELLS, attended
from saccade.methods.cache.streaming import Streaming
from tests.methods.handmade import tiny, tokens

TOKENS, LATER = 60, 30
BUDGET = 0.25
QUEST = "quest:dense_layers=0,page_tokens=4"  # the model has two layers


@pytest.fixture(scope="module")
def net():
    return tiny()


@pytest.fixture(scope="module")
def inputs(net):
    """Queries and keys of the first layer, which no method changes."""
    _, q, k, _ = next(iter(Subject(net).capture_qkv([tokens(TOKENS)])))
    return q, k


def first_place(net):
    return probe(net).sites[0].place


def by_selection(name, net, q, k):
    """What the method's own `select` says of the whole text."""
    place = dataclasses.asdict(first_place(net))
    seen = {"queries": TOKENS, "keys": TOKENS, "seen": TOKENS}
    site = Site(**place, **seen, stage="prefill", budget=Budget(BUDGET))
    return saccade.get(name)().select(q, k, site).mask()[0].expand(q.shape[1], -1, -1)


def by_kept(name, net, heads):
    """What is stored when the prompt has ended, and all that came since."""
    prompt = TOKENS - LATER
    with saccade.attach(net, name, budget=BUDGET) as run, torch.no_grad():
        net(tokens(TOKENS)[:, :prompt], use_cache=True)
        kept = run.record.layers[0].kept[0]
    out = torch.zeros(heads, LATER, TOKENS, dtype=torch.bool)
    for head in range(heads):
        for i in range(LATER):
            out[head, i, kept[head * len(kept) // heads].long()] = True
            out[head, i, prompt : prompt + i + 1] = True
    return out


def by_rule(heads):
    """After the prompt: the first four keys and the newest, as many as the budget keeps of those before, and it."""
    out = torch.zeros(LATER, TOKENS, dtype=torch.bool)
    for i, n in enumerate(range(TOKENS - LATER, TOKENS)):
        held = Budget(BUDGET).tokens(n)
        out[i, : min(held, 4)] = out[i, n - max(0, held - 4) : n + 1] = True
    return out.expand(heads, -1, -1)


def looped(q, k, scale, computed):
    """Maps of the last queries, pair by pair: chosen, mass, covered."""
    heads, queries, n = computed.shape
    rows, columns, first = min(CELLS, queries), min(CELLS, n), n - queries
    chosen, pairs, mass = ([[[0.0] * columns for _ in range(rows)] for _ in range(heads)] for _ in range(3))
    covered, asked = [0.0] * heads, [sum(i * rows // queries == r for i in range(queries)) for r in range(rows)]
    for h in range(heads):
        for i in range(queries):
            key = k[0, h * k.shape[1] // heads]
            weights = [math.exp(float(q[0, h, first + i] @ key[j]) * scale) for j in range(first + i + 1)]
            r, total = i * rows // queries, sum(weights)
            for j, weight in enumerate(weights):
                c, taken = j * columns // n, bool(computed[h, i, j])
                chosen[h][r][c] += taken
                pairs[h][r][c] += 1
                mass[h][r][c] += weight / total / asked[r]
                covered[h] += taken * weight / total / queries
    chosen, pairs, mass, covered = (torch.tensor(x, dtype=torch.float64) for x in (chosen, pairs, mass, covered))
    return chosen / pairs, mass, covered


@pytest.mark.parametrize("name", ["full", "scatterbrain", "streaming", "knorm"])
def test_maps_are_those_of_loops_over_pairs(name, net, inputs, monkeypatch):
    monkeypatch.setattr(maps, "QUERIES", 17)
    q, k = inputs
    found = attended(net, tokens(TOKENS), name, BUDGET)
    last, computed = found.stretches[-1], causal_mask(TOKENS, TOKENS).expand(q.shape[1], -1, -1)
    if name == "scatterbrain":
        computed = by_selection(name, net, q, k)
    elif name == "knorm":
        computed = by_kept(name, net, q.shape[1])
    elif name == "streaming":
        assert [s.stage for s in found.stretches] == ["prefill", "decode"]
        computed = by_rule(q.shape[1])
    chosen, mass, covered = looped(q, k, first_place(net).scale, computed)
    ours = last.layers[0]
    torch.testing.assert_close(ours.chosen, chosen, equal_nan=True)
    torch.testing.assert_close(ours.mass, mass)
    torch.testing.assert_close(ours.covered, covered)


@pytest.mark.parametrize("name", ["full", "hip", "streaming", "tova", QUEST])
def test_rows_of_mass_sum_to_one_and_what_is_chosen_is_a_share(name, net):
    for stretch in attended(net, tokens(40), name, BUDGET).stretches:
        assert 0 < stretch.covered <= 1 + torch.finfo(torch.float64).eps * 40 and 0 < stretch.density <= 1
        for layer in stretch.layers:
            torch.testing.assert_close(layer.mass.sum(-1), torch.ones_like(layer.mass[..., 0]))
            there = causal_mask(stretch.queries, stretch.keys)  # a cell is one pair here
            assert torch.equal(layer.chosen.isnan()[0], ~there)
            assert set(layer.chosen[:, there].flatten().tolist()) <= ({1.0} if name == "full" else {0.0, 1.0})


def test_what_is_read_is_what_the_record_counts(net):
    found = attended(net, tokens(40), QUEST, BUDGET)
    with saccade.attach(net, QUEST, budget=BUDGET) as run, torch.no_grad():
        run.note_reads = True
        cache = net(tokens(40)[:, :20], use_cache=True)[CACHE]
        for i in range(20, 40):
            net(tokens(40)[:, i : i + 1], **{CACHE: cache}, use_cache=True)
        record = run.record
    (stretch,) = found.stretches
    for i, layer in enumerate(stretch.layers):
        assert torch.equal(layer.chosen.nan_to_num().sum(-2).long(), record.layers[i].reads[0])


def test_the_model_is_left_as_it_was(net):
    before = net(tokens(9)).logits
    attended(net, tokens(9), "hip", BUDGET)
    assert torch.equal(net(tokens(9)).logits, before)


@dataclass(frozen=True)
class Unselected(Streaming):
    """Computes its prompt without a selection."""

    def select(self, q, k, site):
        return None


@pytest.mark.parametrize(
    ("who", "count", "kind", "said"),
    [
        ("retrieval-head", 9, CannotRun, "a picture of what 'retrieval-head' attends to: it only looks on"),
        ("landmark", 9, CannotRun, "use 'landmark' in a loaded model: it is a layer that is trained"),
        (Unselected(), 9, CannotRun, "overhear streaming: its prompt was read by no selection, so that it cannot be"),
        ("full", 3, BadInput, "a picture of 3 tokens: it takes 4 or more. Give more text."),
        ("full", 5000, BadInput, "a picture of 5,000 tokens: every pair is looked at, of 4,096 tokens at most. Give"),
    ],
)
def test_what_has_no_map_is_refused(who, count, kind, said, net, monkeypatch):
    monkeypatch.setattr(net.config, "max_position_embeddings", 10_000)
    with pytest.raises(kind) as e:
        attended(net, tokens(count), who)
    assert said in str(e.value)


def test_texts_that_the_model_cannot_read_are_refused(net, monkeypatch):
    monkeypatch.setattr(net.config, "max_position_embeddings", 8)
    with pytest.raises(BadInput, match=r"a picture of 9 tokens: the model was trained for 8\. Give less text"):
        attended(net, tokens(9), "full")
    with pytest.raises(BadInput, match=r"a picture of ids \(2, 9\): they are not \[1, tokens\]\. Give one text"):
        attended(net, tokens(9, 2), "full")
