"""Texts with a needle, and nets with other layers but the same weights."""

from __future__ import annotations

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.claims._planted import MARK, Study, window
from saccade.core.budget import Budget
from saccade.core.method import Slot
from saccade.core.selection import causal_mask
from saccade.methods.mixers.landmark import with_landmarks
from saccade.methods.nets import make_mixer
from saccade.tasks.training.needle import ASKED, NEEDLES, QUESTION, RUN


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(12, 60), marked=st.booleans())
def test_a_text_holds_one_needle_before_the_question(tokens, marked):
    layout = functools.partial(with_landmarks, landmark=MARK, block_tokens=5) if marked else torch.clone
    texts = Study(tokens, rows=1, steps=0, seeds=1, layout=layout).tests(tokens)
    for row, needle in zip(texts.ids.tolist(), texts.needle.tolist()):
        assert row.count(needle) == RUN and row.count(QUESTION) == ASKED
        assert not set(row) & (set(NEEDLES) - {needle})
        assert row.index(needle) < row.index(QUESTION)
        predicted = [at for at, there in enumerate(texts.prose.tolist()) if there]
        assert all(row[at] not in (QUESTION, MARK) and row[at - 1] != MARK for at in predicted)


def test_other_layers_get_the_weights():
    study = Study(20, rows=2, steps=1, seeds=2)
    nets = study.trained("full")
    for ours, theirs in zip(study.others(nets, "landmark:block_tokens=4"), nets):
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert not torch.equal(nets[0].embedding.weight, nets[1].embedding.weight)


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0.05, 0.9), n=st.integers(8, 64))
def test_a_window_has_no_more_pairs_than_it_may(share, n):
    layer = make_mixer("streaming:sink_tokens=0", Slot(8, 2, budget=Budget.of(window(share, n))))
    pairs = layer.selection(torch.zeros(1, n, 8)).mask()[0, 0]
    assert int(pairs.sum()) <= max(share * int(causal_mask(n, n).sum()), 2 * n)
