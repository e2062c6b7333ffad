"""Rows that lie packed in part: beams, batches, padding, unequal heads, tokens taken back, bytes, what is spelt out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, packing
from saccade.attach.compat import CACHE
from saccade.attach.store import SPARE
from saccade.core.card import Card
from saccade.core.errors import CannotRun
from saccade.core.method import Cache
from saccade.methods.cache.kivi import Kivi
from tests.conformance.runs import read_padded
from tests.methods.handmade import in_pieces, tiny, tokens

PROMPT = 50
PACKER = Kivi(group_tokens=8, group_channels=4, residual_tokens=8, bits=4)


@dataclass(frozen=True)
class Unequal(Cache):
    """The last tokens, a few more in every other head."""

    card = Card(name="unequal", title="", family="cache", paper="", year=2024, summary="a test")

    def score(self, seen, site):
        return torch.arange(seen.keys.shape[2]).float().expand(seen.keys.shape[:3])

    def allocate(self, scores, budget, site):
        b, g, k = scores.shape
        return (k // 2 + 5 * (torch.arange(g) + site.layer)).expand(b, g)


COMPOSED = [[PACKER], ["snapkv", PACKER], ["minference", "snapkv", PACKER], [Unequal(), PACKER]]


def attached(model, methods):
    return attach(model, methods, budget=1.0 if methods == [PACKER] else 0.6)


@pytest.mark.parametrize("methods", COMPOSED, ids=lambda m: str(len(m)))
@given(data=st.data())
@settings(max_examples=2, deadline=None)
def test_steps_equal_one_forward(methods, data):
    model, ids = tiny(), tokens(PROMPT + 40)
    cuts = data.draw(st.lists(st.integers(PROMPT + 1, PROMPT + 39), unique=True).map(sorted))
    with attached(model, methods):
        torch.testing.assert_close(in_pieces(model, ids, [PROMPT, *cuts]), in_pieces(model, ids, [PROMPT]))


@pytest.mark.parametrize("methods", COMPOSED, ids=lambda m: str(len(m)))
@given(data=st.data())
@settings(max_examples=3, deadline=None)
def test_rows_go_where_they_are_sent(methods, data):
    model, ids = tiny(), tokens(PROMPT + 30, 3)
    how = data.draw(st.sampled_from(["reorder_cache", "batch_select_indices", "batch_repeat_interleave"]))
    order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
    order = torch.arange(3).repeat_interleave(2) if how == "batch_repeat_interleave" else order
    with attached(model, methods), torch.no_grad():
        cache = model(ids[:, :PROMPT], use_cache=True)[CACHE]
        model(ids[:, PROMPT : PROMPT + 12], **{CACHE: cache})
        getattr(cache, how)(2 if how == "batch_repeat_interleave" else order)
        moved = model(ids[order, PROMPT + 12 :], **{CACHE: cache}).logits
        straight = in_pieces(model, ids[order], [PROMPT, PROMPT + 12])[:, PROMPT + 12 :]
    torch.testing.assert_close(moved, straight)


@pytest.mark.parametrize("methods", COMPOSED, ids=lambda m: str(len(m)))
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_as_if_alone(methods, side):
    model, (a, b, c) = tiny(), tokens(PROMPT + 20, 3)
    prompts, rests = [a[:PROMPT], b[:27], c[:0]], [a[PROMPT:], b[PROMPT:], c[PROMPT:]]
    with attached(model, methods):
        together = read_padded(model, prompts, rests, side)
        for i in range(2):
            alone = in_pieces(model, torch.cat([prompts[i], rests[i]])[None], [len(prompts[i])])
            torch.testing.assert_close(together[i], alone)
    assert together[2].isfinite().all()


@pytest.mark.parametrize("methods", COMPOSED, ids=lambda m: str(len(m)))
def test_beams_are_searched(methods):
    model, ids = tiny(), tokens(PROMPT, 2)
    told = {"max_new_tokens": 24, "min_new_tokens": 24, "num_beams": 3, "do_sample": False}
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with attached(model, methods):
        both = model.generate(ids, attention_mask=mask, **told)
        assert torch.equal(both[0], model.generate(ids[:1], **told)[0])
        assert torch.equal(both[1, 9:], model.generate(ids[1:, 9:], **told)[0])


@given(st.integers(0, 20), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=6, deadline=None)
def test_guesses_that_are_taken_back_were_never_there(before, wrong, after):
    """Packing waits while tokens may be taken back, and the tokens read meanwhile find packed what would be."""
    model = tiny()
    known, guess, rest = tokens(PROMPT + before), tokens(wrong + 1)[:, 1:], tokens(after + 2)[:, 2:]
    with attach(model, PACKER), torch.no_grad():
        cache = model(known[:, :PROMPT], use_cache=True)[CACHE]
        if before:
            model(known[:, PROMPT:], **{CACHE: cache})
        for layer in cache.layers:
            layer.activate_past_recording()
        model(guess, **{CACHE: cache})
        cache.crop(-wrong)
        found = model(rest, **{CACHE: cache}).logits
        straight = in_pieces(model, torch.cat([known, rest], 1), [PROMPT])[:, known.shape[1] :]
    torch.testing.assert_close(found, straight)


def test_packed_tokens_are_not_taken_back_in_silence():
    model, ids = tiny(), tokens(PROMPT)
    with attach(model, PACKER), torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
        cache.crop(-10)  # 40 of 50 are packed
        said = r"take back 1 tokens: all but the last 0 are packed in some row\. Take back fewer, or call activate_"
        with pytest.raises(CannotRun, match=said):
            cache.crop(-1)
        assert cache.get_seq_length() == 40 and cache.layers[0].store.seen == [40]
        assert model(ids[:, :1], **{CACHE: cache}).logits.isfinite().all()


@pytest.mark.parametrize("methods", COMPOSED, ids=lambda m: str(len(m)))
def test_nothing_is_held_twice(methods):
    """Bytes reported are bytes held, which are codes for what is packed and numbers for what is not."""
    model, ids = tiny(), tokens(PROMPT + 30, 2)
    with attached(model, methods) as run, torch.no_grad():
        cache = model(ids[:, :PROMPT], use_cache=True)[CACHE]
        for i in range(PROMPT, PROMPT + 30):
            model(ids[:, i : i + 1], **{CACHE: cache})
            every = [rows for layer in cache.layers for rows in layer.store.buckets]
            used = sum(t.nbytes for rows in every for t in rows.tensors())
            assert used <= run.record.bytes_held <= used * (1 + 1 / SPARE)
            for rows in every:
                assert rows.front == PACKER.packed_tokens(rows.length) > 0
                exact = {rows.length - rows.front}
                assert {c.shape[1] for c in rows.columns.values()} == exact
                assert all(t.untyped_storage().nbytes() == t.nbytes for t in rows.tensors())


def test_what_is_packed_is_spelt_out_in_pieces(monkeypatch):
    """And the size of the pieces changes nothing."""
    model, ids, pieces = tiny(), tokens(PROMPT + 20), []
    with attach(model, PACKER):
        expected = in_pieces(model, ids, [PROMPT])
    plain = Kivi.unpack

    def unpack(self, packed):
        pieces.append(plain(self, packed))
        return pieces[-1]

    monkeypatch.setattr(packing, "PIECE_TOKENS", 16)
    monkeypatch.setattr(Kivi, "unpack", unpack)
    with attach(model, PACKER):
        torch.testing.assert_close(in_pieces(model, ids, list(range(PROMPT, PROMPT + 20))), expected)
    assert {k.shape[1] for k, _ in pieces} == {8, 16}
