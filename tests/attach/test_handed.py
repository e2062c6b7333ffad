"""What a method hands from layer to layer: within one forward, sequence by sequence, and to methods that say so."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from saccade.attach import attach
from saccade.core.card import Card
from saccade.core.method import Decode
from saccade.core.selection import dense
from tests.conformance.runs import read_padded
from tests.methods.handmade import in_pieces, tiny, tokens

LAYERS = 3


@dataclass(frozen=True)
class Tells(Decode):
    """Hands on which layer it was in and how many tokens its sequences had; notes what it was handed."""

    persistent: ClassVar[bool] = True
    card = Card(name="tells", title="tells", family="decode", paper="", year=2024, summary="a test")

    heard: list = dataclasses.field(default_factory=list, compare=False)

    def select(self, q, stored, site):
        before = {name: x.tolist() for name, x in site.handed.items()}
        self.heard.append((site.layer, site.seen, before))
        site.handed["layer"] = torch.full((len(q),), site.layer)
        site.handed["seen"] = torch.full((len(q),), site.seen)
        return dense(site.queries, site.keys)


@dataclass(frozen=True)
class Forgets(Tells):
    persistent: ClassVar[bool] = False


def expected(*lengths):
    """Of forwards whose sequences have so many tokens."""
    there = [{}] + [{"layer": layer} for layer in range(LAYERS - 1)]
    return [(i, n, h) for n in lengths for i, h in enumerate(there)]


def in_order(heard):
    """By sequence, layer by layer, without the number of tokens, which must be that of the sequence itself."""
    assert all(before.get("seen", [seen]) == [seen] for _, seen, before in heard)
    short = [(i, n, {"layer": before["layer"][0]} if before else {}) for i, n, before in heard]
    return sorted(short, key=lambda x: x[:2][::-1])


def test_layers_hear_those_before_them_in_the_same_forward():
    model, method = tiny(layers=LAYERS), Tells()
    with attach(model, method) as run:
        in_pieces(model, tokens(9), [6, 7])
        assert run.handed == {}, "it is held for nobody"
    assert in_order(method.heard) == expected(7, 9)


def test_rows_of_other_lengths_do_not_mix():
    model, method, ids = tiny(layers=LAYERS), Tells(), tokens(12, 2)
    with attach(model, method):
        read_padded(model, [ids[0, :9], ids[1, :5]], [ids[0, 9:], ids[1, 9:]], "left")
    assert in_order(method.heard) == expected(8, 12)


def test_a_forward_that_broke_off_leaves_nothing():
    model, method = tiny(layers=LAYERS), Tells()
    with attach(model, method):
        with pytest.raises(ZeroDivisionError):
            in_pieces(breaking(model), tokens(9), [6])
        method.heard.clear()
        in_pieces(model, tokens(9), [6])
    assert in_order(method.heard) == expected(9)


class breaking:
    """The model, which breaks off in the middle of its second forward."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == 2:
            handle = self.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
            try:
                return self.model(*args, **options)
            finally:
                handle.remove()
        return self.model(*args, **options)


def test_who_does_not_say_so_is_handed_nothing():
    model, method = tiny(layers=LAYERS), Forgets()
    with attach(model, method):
        in_pieces(model, tokens(9), [6])
    assert [before for _, _, before in method.heard] == [{}] * LAYERS
