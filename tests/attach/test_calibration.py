"""What calibration is given: the tensors that attention really sees."""

from __future__ import annotations

import pytest
import torch

from saccade.attach import attach
from saccade.attach.calibration import Subject
from saccade.core.errors import BadInput, CannotRun
from saccade.methods.cache.streaming import Streaming
from tests.methods.handmade import tiny, tokens, under_mask


def test_captured_tensors_are_those_of_the_attention():
    model, samples = tiny(layers=3), [tokens(9), tokens(6)]
    captured = list(Subject(model).capture_qkv(samples))
    assert [layer for layer, *_ in captured] == [0, 1, 2] * 2
    seen = []

    def note(layer, q, k):
        seen.append((q, k))
        return torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)

    for ids in samples:
        under_mask(model, ids, note)
    for (_, q, k, v), (other_q, other_k) in zip(captured, seen):
        torch.testing.assert_close((q, k), (other_q, other_k))
        assert v.shape == k.shape


def test_the_model_is_left_as_it_was():
    model, ids = tiny(), tokens(7)
    with torch.no_grad():
        before = model(ids).logits
        list(Subject(model).capture_qkv([ids]))
        assert torch.equal(model(ids).logits, before)


def test_words_are_the_tokens_that_occur():
    subject = Subject(tiny())
    samples = [torch.tensor([[9, 4, 9]]), torch.tensor([[7]])]
    assert subject.words(samples).tolist() == [4, 7, 9]
    with pytest.raises(BadInput, match=r"calibration sample 1: it is torch\.float32 \(1, 2\)\. Give token ids \[1 n\]"):
        subject.words([samples[0], torch.zeros(1, 2)])


def test_bad_samples_and_busy_models_are_refused():
    subject = Subject(tiny())
    with pytest.raises(BadInput, match=r"calibrate: there are no samples. Give rows of token ids"):
        list(subject.capture_qkv([]))
    with pytest.raises(BadInput, match=r"calibration sample 0: it is torch.int64 \(5,\). Give token ids \[1 n\]"):
        list(subject.capture_qkv([torch.zeros(5, dtype=torch.long)]))
    model = tiny()
    busy = pytest.raises(CannotRun, match=r"streaming is attached; detach it first")
    with attach(model, Streaming(), budget=0.5), busy:
        Subject(model)
