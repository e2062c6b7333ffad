"""Gate training on a tiny model: where the losses must be exactly zero, and recall texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach.calibration import Subject
from saccade.attach.gates import NATO, Gating, recall_text, streaming
from saccade.attach.listening import listening
from saccade.core import rng
from saccade.core.errors import BadInput, CannotRun
from saccade.core.selection import Spans
from saccade.methods.cache.duo_attention import DuoAttention
from saccade.ops.attend.reference import masked
from tests.methods.handmade import noise, tiny, tokens, under_mask

N = 24
ANSWERS = (torch.arange(N) >= 16)[None]


class Words:
    """A tokenizer that numbers words in the order they come."""

    def __init__(self):
        self.words: dict[str, int] = {}

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [self.words.setdefault(w, 3 + len(self.words) % 120) for w in text.split()]}


def gating(model, full_term="teacher", **changes):
    return Gating(Subject(model), DuoAttention(sink_tokens=2, recent_tokens=5, full_term=full_term, **changes))


@given(st.integers(1, 60), st.integers(0, 20), st.integers(1, 30), st.integers(1, 2))
@settings(deadline=None)
def test_streaming_in_blocks_is_attention_under_its_mask(n, sinks, recent, rows):
    q, k, v = (noise(rows, 2, n, 8, name=x).double() for x in "qkv")
    one = torch.ones(1, dtype=torch.long)
    mask = Spans(sinks=sinks * one, window=recent * one, queries=n, keys=n).mask()
    torch.testing.assert_close(streaming(q, k, v, sinks, recent, 0.3), masked(q, k, v, mask, scale=0.3)[0])


@pytest.mark.parametrize("full_term", ["teacher", "student"])
def test_open_gates_change_nothing_and_only_the_weight_pulls(full_term):
    model = tiny()
    one = gating(model, full_term)
    with listening(model, one.subject.found, one._listener):
        assert one.step(tokens(N), ANSWERS) == 0.0
    pull = torch.full_like(one.alpha, 0.05 / one.alpha.numel())
    if full_term == "teacher":  # near only; at alpha = 1 the distance is 0, and so is its slope
        assert torch.equal(one.alpha.grad, pull)
    torch.testing.assert_close(one.alpha.grad, pull)


@pytest.mark.parametrize("full_term", ["teacher", "student"])
def test_closed_gates_are_the_streaming_model(full_term):
    model, ids = tiny(), tokens(N)
    one = gating(model, full_term)
    with torch.no_grad():
        one.alpha.zero_()
    i, j = torch.arange(N)[:, None], torch.arange(N)
    near = ((j < 2) | (i - j < 5)).expand(1, 4, N, N)
    with listening(model, one.subject.found, one._listener):
        one.step(ids, ANSWERS)
        with torch.no_grad():
            found = model.lm_head(one._final(ids).double())
    # final states pass through float32
    torch.testing.assert_close(found.float(), under_mask(model, ids, lambda *_: near).float())


def test_training_moves_gates_and_leaves_the_model_alone():
    model = tiny().float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    subject = Subject(model)
    subject.tokenizer = Words()
    seen = []
    recipe = DuoAttention(sink_tokens=2, recent_tokens=8, train_steps=4, learning_rate=0.1)
    gates, figures = subject.train_gates(recipe, [tokens(700)], lambda done, total, what: seen.append((done, total)))
    assert gates.shape == (2, 2) and gates.dtype == torch.float32
    assert ((gates >= 0) & (gates < 1)).all() and figures["mean_gate"] == round(float(gates.mean()), 4)
    assert seen == [(i, 4) for i in range(1, 5)]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_answers_are_the_hidden_keys(seed, keys, words):
    tokenizer = Words()
    sample = torch.full((1, 700), 2)
    ids, answers = recall_text(tokenizer, sample, rng.python("test", seed), keys, words)
    assert ids.shape == answers.shape and ids.shape[1] <= 700
    back = {number: word for word, number in tokenizer.words.items()}
    said = [back[i].strip(".") for i in ids[answers].tolist()]
    assert len(said) == keys * words and set(said) <= set(NATO)
    text = [back.get(i, "").strip(".") for i in ids[0].tolist()]
    for key in range(keys):
        secret = said[key * words : (key + 1) * words]
        places = [i for i in range(len(text)) if text[i : i + words] == secret]
        assert len(places) >= 2 and not answers[0, places[0]]


def test_what_cannot_be_trained_says_why():
    with pytest.raises(BadInput, match=r"a recall text of 40 tokens: 5 pass keys and their questions take \d+"):
        recall_text(Words(), tokens(40), rng.python("test"), 5, 8)
    with pytest.raises(CannotRun, match=r"no tokenizer lies beside it, and recall texts are made of words. Load both"):
        Subject(tiny()).tokenizer  # noqa: B018
