"""Fine-tuning under gates: gradients through the chosen blocks, gates that go on learning, what comes out of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from pathlib import Path

import pytest
import torch

from saccade.attach import attach, fingerprint
from saccade.attach.calibration import Subject
from saccade.attach.tuning import Tuning
from saccade.core.errors import CannotRun
from saccade.methods.sparse.seer_attention import SeerAttention
from tests.methods.handmade import tiny, tokens, under_mask

SHORT = SeerAttention(block_tokens=8, train_steps=5, train_texts=1)


def text():
    return tokens(70, 2)


@functools.cache
def gated():
    model = tiny()
    return model, dataclasses.replace(SHORT, artefact=SHORT.calibrate(Subject(model), [tokens(64)]))


def test_the_model_learns_through_the_chosen_blocks_and_gates_from_the_whole_map():
    model, method = gated()
    model.zero_grad()
    tuning = Tuning(model, method, 0.4)
    loss, apart = tuning.step(text())
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with attach(model, method, budget=0.4) as run:
        plain = model(input_ids=text(), labels=text(), use_cache=False).loss
        plain.backward()
        assert run.record.density("prefill") <= 0.4
    assert loss == pytest.approx(float(plain.detach()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    assert apart > 0 and all(x.grad.abs().sum((1, 2, 3)).min() > 0 for x in tuning.gates.values())


def test_both_parts_fall_and_what_was_learnt_is_attached():
    model, method = copy.deepcopy(gated()[0]), gated()[1]
    tuning = Tuning(model, method, 0.5)
    groups = [{"params": model.parameters(), "lr": 3e-3}, {"params": tuning.gates.values(), "lr": 3e-2}]
    optimiser, parts = torch.optim.AdamW(groups, weight_decay=0.0), []
    for _ in range(6):
        parts.append(tuning.step(text()))
        optimiser.step()
        optimiser.zero_grad()
    assert parts[-1][0] < 0.9 * parts[0][0] and parts[-1][1] < parts[0][1]
    tuned = tuning.tuned([text()[:1], text()[1:]])
    assert tuned.artefact.fingerprint == fingerprint(model) != method.artefact.fingerprint
    with attach(model, tuned, budget=0.5), torch.no_grad():
        loss = float(model(input_ids=text(), labels=text(), use_cache=False).loss)
    assert loss < parts[0][0]


def test_at_full_budget_it_is_ordinary_training():
    model, method = gated()
    loss, _ = Tuning(model, method, 1.0).step(text())
    logits = under_mask(model, text(), lambda layer, q, k: torch.ones(1, 1, 70, 70, dtype=torch.bool))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text()[:, 1:].flatten())
    assert loss == pytest.approx(float(wanted))


def test_a_model_with_stretched_positions_is_tuned(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "benchmarks"))
    model = tiny()
    plain = under_mask(model, text(), lambda layer, q, k: torch.ones(1, 1, 70, 70, dtype=torch.bool))
    importlib.import_module("finetune_seer").stretch(model, 4.0)
    other = under_mask(model, text(), lambda layer, q, k: torch.ones(1, 1, 70, 70, dtype=torch.bool))
    assert (plain - other).abs().max() > 1e-6 and model.config.rope_parameters["rope_type"] == "yarn"
    method = dataclasses.replace(SHORT, artefact=SHORT.calibrate(Subject(model), [tokens(64)]))
    loss, apart = Tuning(model, method, 0.5).step(text())
    assert 0 < loss < torch.inf and 0 < apart < torch.inf


def test_what_cannot_be_tuned_is_said():
    model, method = gated()
    with pytest.raises(CannotRun, match=r"fine-tune .* under seer-attention: no gates were trained for this model"):
        Tuning(model, SHORT, 0.5)
    foreign = dataclasses.replace(method, artefact=dataclasses.replace(method.artefact, fingerprint="0" * 12))
    with pytest.raises(CannotRun, match=f"made for .*{fingerprint(model)}"):
        Tuning(model, foreign, 0.5)
    other = copy.deepcopy(model)
    other.model.gradient_checkpointing = True
    with pytest.raises(CannotRun, match="activations are checkpointed, and each layer would count twice"):
        Tuning(other, method, 0.5)
    tuning = Tuning(model, method, 0.5)
    mask = torch.ones_like(text())
    mask[0, :3] = 0
    forward = model.forward
    model.forward = functools.partial(forward, attention_mask=mask)
    try:
        with pytest.raises(CannotRun, match="fine-tune on padded rows: gates see whole rows"):
            tuning.step(text())
    finally:
        del model.forward
