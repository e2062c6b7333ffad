"""Properties 7 and 9: grouped heads, and the model as it was found."""

from __future__ import annotations

import copy
import dataclasses
import functools
from unittest import mock

import pytest
import torch

from saccade import models
from saccade.attach import attach, fingerprint
from tests.conformance.cases import ATTACH, LAYERS, drawn, equipped, look, tiny, trials
from tests.conformance.runs import assert_same
from tests.methods.handmade import in_pieces, tokens


@pytest.mark.claims("gqa")
@drawn(6)
def test_07_grouped_heads_equal_repeated_heads(case, data):
    """The same model with its keys and values written out for every query head.

    A cache keeps or drops a key for a whole group, and an option may make groups choose together. There the group's
    queries are alike, so that all of it agrees.
    """
    trial = data.draw(trials(case))
    together = "evict" in case.parts or "group" in case.option
    grouped = dataclasses.replace(trial, model=alike(trial.heads) if together else trial.model)
    made = equipped(grouped.method, tiny(*trial.heads))
    pieces = (trial.ids(), [trial.prompt])
    out = []
    for model in (grouped.model, written_out(grouped.model)):
        method = dataclasses.replace(made, artefact=made.artefact and for_model(made.artefact, model, trial.heads))
        with mock.patch.object(ATTACH, "probe", look):  # these models do not change
            run = attach(model, method, budget=trial.budget, seed=trial.seed)
        with run:
            out.append(in_pieces(model, *pieces))
    assert_same(out[1], out[0], grouped)


@functools.cache
def alike(heads):
    """The queries of each group are copies of its first."""
    model, (h, g, d) = copy.deepcopy(tiny(*heads)), heads
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight.data.unflatten(0, (g, h // g, d))
        weight.copy_(weight[:, :1].clone().expand_as(weight))
    return model


@functools.cache
def written_out(model):
    """One key/value head for every query head, equal within a group."""
    config = model.config
    h, g, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    twin, weights = models.tiny("llama", layers=LAYERS, heads=h, kv_heads=h, head_size=d).double(), model.state_dict()
    for name in [n for n in weights if "k_proj" in n or "v_proj" in n]:
        weights[name] = weights[name].unflatten(0, (g, d)).repeat_interleave(h // g, 0).flatten(0, 1)
    twin.load_state_dict(weights)
    return twin


def for_model(artefact, model, heads):
    """What was learnt per key/value head, [layers g ...], written out where the model is; stamped for it."""
    h, g, _ = heads
    times = model.config.num_key_value_heads // g
    tensors = {n: t.repeat_interleave(times, 1) if t.shape[1] == g != h else t for n, t in artefact.tensors.items()}
    return dataclasses.replace(artefact, tensors=tensors, fingerprint=fingerprint(model))


@pytest.mark.claims("detach")
@drawn()
def test_09_detach_puts_everything_back(owner, data):
    trial = data.draw(trials(owner))
    with unchanged(trial), trial.attach(anew=True):
        in_pieces(trial.model, trial.ids(), [trial.prompt])
        trial.model.generate(trial.ids()[:, :4], max_new_tokens=2)


@pytest.mark.claims("detach")
@drawn()
def test_09_detach_puts_everything_back_after_an_exception(owner, data):
    """Raised in the user's block, and in the middle of a forward."""
    trial = data.draw(trials(owner))
    with unchanged(trial), pytest.raises(KeyError, match="ours"), trial.attach(anew=True):
        in_pieces(trial.model, trial.ids(), [trial.prompt])
        raise KeyError("ours")
    last = trial.model.model.layers[-1].mlp
    with unchanged(trial), pytest.raises(KeyError, match="theirs"), trial.attach(anew=True):
        handle = last.register_forward_pre_hook(fail)
        try:
            in_pieces(trial.model, trial.ids(), [trial.prompt])
        finally:
            handle.remove()


def fail(*_):
    """A hook that fails."""
    raise KeyError("theirs")


class unchanged:
    """The model gives bit for bit what it gave, and carries nothing more than it did."""

    def __init__(self, trial):
        self.model, self.pieces = trial.model, (trial.prompt, trial.rest)

    def __enter__(self):
        self.logits, self.state = alone(self.model, *self.pieces), self._carried()

    def __exit__(self, *error):
        if error[0] is None:
            assert torch.equal(alone.__wrapped__(self.model, *self.pieces), self.logits)
            assert self._carried() == self.state

    def _carried(self):
        carried = [(name, sorted(m.__dict__), len(m._forward_pre_hooks)) for name, m in self.model.named_modules()]
        return self.model.config._attn_implementation, carried


@functools.cache  # methods meet the same examples: each is held against the logits from before any was attached
def alone(model, prompt, rest):
    """What the model gives."""
    return in_pieces(model, tokens(prompt + rest), [prompt])
