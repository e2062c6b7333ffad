"""Heads taken out: none is the identity, one attends to all tokens alike or gives nothing, and nothing else changes."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach import attach
from saccade.attach.ablation import so_far, without_heads
from saccade.attach.compat import CACHE
from saccade.attach.listening import listening
from saccade.attach.probe import probe
from saccade.core.errors import BadOption, CannotRun
from saccade.core.selection import causal_mask
from saccade.methods.cache.streaming import Streaming
from saccade.ops.attend.reference import masked
from tests.methods.handmade import in_pieces, noise, tiny, tokens

N, PROMPT = 24, 17
every_head = st.tuples(st.integers(0, 1), st.integers(0, 3))
some_heads = st.lists(every_head, max_size=8)


@functools.cache
def model():
    return tiny()


def by_hand(heads, ids):
    """Logits of one pass in which these heads' logits are all zero before the mask."""

    class Hand:
        run = SimpleNamespace(title="oracle")

        def __init__(self, spot):
            self.place = spot.place

        def forward(self, layer, q, k, v, real):
            q = q.clone()
            q[:, [head for at, head in heads if at == self.place.layer]] = 0
            return masked(q, k, v, causal_mask(q.shape[2], k.shape[2]), scale=self.place.scale)[0]

    with listening(model(), probe(model()), Hand), torch.no_grad():
        return model()(ids, use_cache=False).logits


@given(some_heads, st.lists(st.integers(1, N - 1), min_size=1, max_size=3, unique=True))
@settings(max_examples=25, deadline=None)
def test_a_head_that_attends_to_all_alike_has_logits_of_zero(heads, cuts):
    ids = tokens(N, 2)
    with without_heads(model(), heads):
        found = in_pieces(model(), ids, sorted(cuts))
    torch.testing.assert_close(found, by_hand(heads, ids))


@given(some_heads)
@settings(max_examples=10, deadline=None)
def test_a_head_that_gives_nothing_is_one_whose_output_is_not_read(heads):
    ids, deaf = tokens(N, 2), copy.deepcopy(model())
    for layer, head in heads:
        deaf.model.layers[layer].self_attn.o_proj.weight.data[:, head * 16 : (head + 1) * 16] = 0
    with without_heads(model(), heads, "zero"):
        found = in_pieces(model(), ids, [PROMPT])
    torch.testing.assert_close(found, in_pieces(deaf, ids, [PROMPT]))


@pytest.mark.parametrize("mode", ["uniform", "zero"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_without_no_head_every_bit_is_as_it_was(family, mode):
    one, ids = models.tiny(family), tokens(N)
    before = in_pieces(one, ids, [PROMPT])
    with without_heads(one, [], mode):
        assert torch.equal(in_pieces(one, ids, [PROMPT]), before)
    with pytest.raises(KeyError), without_heads(one, [(0, 0)], mode):
        assert not torch.equal(in_pieces(one, ids, [PROMPT]), before)
        raise KeyError
    assert torch.equal(in_pieces(one, ids, [PROMPT]), before)


def test_a_prompt_read_before_the_block_is_read_with_all_heads():
    ids = tokens(N)
    with torch.no_grad():
        cache = model()(ids[:, :PROMPT], use_cache=True)[CACHE]
        before = [layer.keys.clone() for layer in cache.layers]
        with without_heads(model(), [(0, 1), (1, 2)]):
            model()(ids[:, PROMPT:], **{CACHE: cache})
    assert all(torch.equal(layer.keys[:, :, :PROMPT], old) for layer, old in zip(cache.layers, before))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_among_all(side):
    ids, real = tokens(N, 2), torch.ones(2, N, dtype=torch.long)
    real[1, slice(0, 5) if side == "left" else slice(N - 5, N)] = 0
    position = (real.cumsum(-1) - 1).clamp(min=0)
    with without_heads(model(), [(0, 1), (1, 2)]), torch.no_grad():
        together = model()(ids, attention_mask=real, position_ids=position).logits[1][real[1].bool()]
        alone = model()(ids[1:, real[1].bool()]).logits[0]
    torch.testing.assert_close(together, alone)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_the_mean_so_far(queries, keys, heads):
    queries, v = min(queries, keys), noise(2, heads, keys, 4).double()
    real = noise(2, keys, name="real") > -0.5
    found = so_far(v, queries, real)
    for row in range(2):
        for i in range(queries):
            seen = [j for j in range(keys - queries + i + 1) if real[row, j]]
            wanted = sum((v[row, :, j] for j in seen), torch.zeros_like(v[row, :, 0])) / max(1, len(seen))
            torch.testing.assert_close(found[row, :, i], wanted)


def test_what_is_not_there_cannot_be_taken_out():
    for head in ((2, 0), (0, 4), (-1, 0)):
        said = rf"head {head[1]} of layer {head[0]}: there are 2 layers of 4\. Count from 0"
        with pytest.raises(BadOption, match=said):
            without_heads(model(), [head]).__enter__()
    with pytest.raises(BadOption, match=r"mode='sink': it takes 'uniform' or 'zero'\. Give one of these"):
        without_heads(model(), [], "sink").__enter__()
    with pytest.raises(CannotRun, match=r"take heads out of Identity: Identity is not a model of transformers"):
        without_heads(torch.nn.Identity(), []).__enter__()
    busy = pytest.raises(CannotRun, match=r"streaming is attached; detach it first")
    with attach(model(), Streaming(), budget=0.5), busy:
        without_heads(model(), []).__enter__()
    nested = pytest.raises(CannotRun, match=r"without_heads is attached")
    with without_heads(model(), []), nested:
        attach(model(), Streaming(), budget=0.5)
    attach(model(), Streaming(), budget=0.5).detach()
