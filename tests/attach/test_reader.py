"""What a method that reads the cache is told: the end of the prompt, true positions, and its own state again."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.attach.store import SPARE
from saccade.core.card import Card
from saccade.core.errors import DoesNotCompose
from saccade.core.method import Decode
from saccade.core.selection import dense
from saccade.methods.cache.snapkv import SnapKV
from saccade.methods.cache.streaming import Streaming
from tests.conformance.runs import read_padded
from tests.methods.handmade import in_pieces, tiny, tokens


@dataclass(frozen=True)
class Listens(Decode):
    """Reads everything, notes what it is given, and remembers one number for each token that it has seen."""

    card = Card(name="listens", title="", family="decode", paper="", year=2026, summary="a test")
    dated = True
    last_tokens: int = 3
    begun: list = field(default_factory=list, compare=False)
    asked: list = field(default_factory=list, compare=False)

    def __post_init__(self):
        pass

    @property
    def observe_tokens(self):
        return self.last_tokens

    def begin(self, seen, site):
        self.begun.append((site, seen))
        site.state["ramp"] = torch.arange(site.seen).expand(len(seen.keys), -1)

    def select(self, q, stored, site):
        self.asked.append((site, dict(site.state), stored))
        site.state["ramp"] = torch.arange(site.seen).expand(len(q), -1)
        return dense(site.queries, site.keys)


def first_layer(noted):
    return [note for note in noted if note[0].layer == 0]


@pytest.mark.parametrize("cuts", [[], [1], [10, 11, 18]])
def test_begin_sees_the_last_prompt_queries_once_however_the_prompt_comes(cuts):
    model, ids, both = tiny(), tokens(24), []
    for pieces in ([20], [*cuts, 20]):
        with attach(model, Listens()) as run, torch.no_grad():
            cache = run.new_cache()
            with run.prompt():
                for a, z in zip([0, *pieces], pieces):
                    model(ids[:, a:z], **{CACHE: cache})
            model(ids[:, 20:], **{CACHE: cache})
            both.append(first_layer(run.methods[0].begun))
    for ((site, seen),) in both:
        assert (site.stage, site.keys, site.seen, site.queries) == ("prefill", 20, 20, 0)
        assert seen.queries.shape[2] == 3 and torch.equal(seen.positions[0, 0], torch.arange(20).int())
    for name in ("keys", "values", "queries"):
        torch.testing.assert_close(*(getattr(noted[0][1], name) for noted in both))


def test_after_an_eviction_begin_and_select_see_what_is_left_at_its_true_positions():
    model, ids, listens = tiny(), tokens(46), Listens(last_tokens=2)
    with attach(model, [SnapKV(window_tokens=4), listens], budget=0.5) as run:
        in_pieces(model, ids, [40, 41])
        kept = run.record.layers[0].kept[0]
    ((site, seen),), asked = first_layer(listens.begun), first_layer(listens.asked)
    assert (site.keys, site.seen, seen.queries.shape[2]) == (20, 40, 2)
    for head in range(2):
        assert torch.equal(seen.positions[0, head], kept[head][:20])
        assert torch.equal(asked[-1][2]["positions"][0, head], kept[head])
    assert [(s.keys, s.seen, s.queries) for s, _, _ in asked] == [(21, 41, 1), (26, 46, 5)]


def test_an_eviction_that_leaves_heads_unequal_is_refused_at_the_end_of_the_prompt():
    @dataclass(frozen=True)
    class Unequal(SnapKV):
        def allocate(self, scores, budget, site):
            return torch.tensor([[3, 9]]).expand(len(scores), -1)

    said = r"'listens' reads all heads of a sequence together, and the eviction left them unequal"
    model, methods = tiny(), [Unequal(window_tokens=4), Listens()]
    with attach(model, methods, budget=0.5), torch.no_grad(), pytest.raises(DoesNotCompose, match=said):
        model(tokens(30), use_cache=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_store_as_much_of_texts_of_different_lengths_are_asked_apart(side):
    """41 and 40 tokens leave 20 each: what is said of one row would be wrong of the other."""
    model, listens, ids = tiny(), Listens(), tokens(44, 2)
    with attach(model, [SnapKV(window_tokens=4), listens], budget=0.5), torch.no_grad():
        read_padded(model, [ids[0, :41], ids[1, :40]], [ids[0, 41:], ids[1, 41:]], side)
    for site, state, stored in first_layer(listens.asked):
        assert (stored["positions"][..., -1] == site.seen - 1).all()
        assert state["ramp"].shape == (1, site.seen - site.queries)
    assert sorted(site.seen for site, _, _ in first_layer(listens.asked)) == [43, 44]


def test_a_row_that_began_empty_remembers_nothing_and_is_asked_alone():
    model, listens, ids = tiny(), Listens(), tokens(24, 2)
    with attach(model, listens), torch.no_grad():
        read_padded(model, [ids[0, :20], ids[1, :0]], [ids[0, 20:], ids[1, 20:]], "left")
    assert sorted(len(state) for _, state, _ in first_layer(listens.asked)) == [0, 1]
    assert len(first_layer(listens.begun)) == 1


@pytest.mark.parametrize("dated", [True, False])
def test_when_tokens_are_taken_back_a_dated_state_stays_and_another_is_that_of_the_prompt(dated):
    Kind = type("Kind", (Listens,), {"dated": dated})
    model, ids, listens = tiny(), tokens(30), Kind()
    with attach(model, listens) as run, torch.no_grad():
        cache = model(ids[:, :20], use_cache=True)[CACHE]
        model(ids[:, 20:25], **{CACHE: cache})
        cache.crop(-2)
        model(ids[:, 23:], **{CACHE: cache})
        held = run.record.layers[0].bytes_held
    assert first_layer(listens.asked)[-1][1]["ramp"].shape[1] == (25 if dated else 20)
    tokens_held = 30 * (2 * 2 * 16 * 8 + 2 * 4)
    numbers = 8 * (30 if dated else 30 + 20)  # no copy of what the prompt left is kept for a dated one
    assert 0 <= held - tokens_held - numbers <= 64 + tokens_held / SPARE


def test_nobody_is_shown_queries_who_did_not_ask():
    quiet = Listens(last_tokens=0)
    with attach(tiny(), [Streaming(), quiet], budget=0.5) as run, torch.no_grad():
        cache = run.model(tokens(20), use_cache=True)[CACHE]
    assert not quiet.begun and all(not layer.queries for layer in cache.layers)
