"""Property 13: every documented error is raised, with its text; nothing bad passes in silence."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import saccade
from saccade import models
from saccade.attach import attach, explain, fingerprint
from saccade.attach.engine import Engine
from saccade.core.errors import (
    BadArtefact,
    BadBudget,
    BadInput,
    BadOption,
    CannotRun,
    DoesNotCompose,
    SaccadeError,
)
from saccade.core.method import configure, options
from tests.conformance.cases import Trial, equipped, tiny
from tests.conformance.runs import read
from tests.methods.handmade import in_pieces, tokens

HEADS = (4, 2, 16)
NO_BUDGETS = {
    0: "keeps nothing",
    -0.5: "keeps nothing",
    1.5: r"cannot exceed 1.*'1\.5tok'",
    float("nan"): "keeps nothing",
    float("inf"): "keeps nothing",
    "0tok": "keeps nothing",
    "150%": "cannot exceed 1",
    "much": r"no budget.*0\.25.*4096tok.*2GiB",
    None: "no budget",
}


def made(case):
    """The case's method, with what it needs to work in a tiny model."""
    return equipped(case.method(), tiny(*HEADS))


@pytest.mark.claims("errors")
def test_13_a_budget_that_is_none(plain):
    for budget, text in NO_BUDGETS.items():
        with pytest.raises(BadBudget, match=text):
            attach(tiny(*HEADS), made(plain), budget=budget)
        assert not hasattr(tiny(*HEADS), "_saccade_run")


@pytest.mark.claims("errors")
def test_13_an_unknown_option_names_the_nearest(plain):
    known = list(options(made(plain)))
    with pytest.raises(BadOption, match=f"none of that name.*{', '.join(known)}" if known else "none of that name"):
        configure(made(plain), {"nonesuch": 1})
    for name in known:
        with pytest.raises(BadOption, match=f"Did you mean '{name}'"):
            configure(made(plain), {name + "s": 1})


@pytest.mark.claims("errors")
def test_13_an_option_of_the_wrong_kind(case):
    """Whole numbers are not negative, fractional or truths; a choice is one of those that are named."""
    hints = inspect.get_annotations(type(made(case)))
    for name, value in options(made(case)).items():
        wrong = [-1, 1.5, True] if hints[name] == "int" else ["nonesuch"] if "Literal" in hints[name] else []
        for x in wrong:
            with pytest.raises(BadOption, match=rf"{case.name}\.{name}={re.escape(repr(x))}.*it takes"):
                dataclasses.replace(made(case), **{name: x})
        if not isinstance(value, str):
            with pytest.raises(BadOption, match=rf"{case.name}\.{name}='nonesuch'.*it takes"):
                configure(made(case), {name: "nonesuch"})


@pytest.mark.claims("errors")
def test_13_a_whole_number_works_or_is_refused_by_name(case):
    """Every bound: a value that an option takes gives finite logits, any other an error that names the option. Of a
    method with another choice than its own, half as many as of the method as it comes."""
    budget = (case.budgets or (1.0,))[-1]
    numbers = [n for n, v in options(made(case)).items() if isinstance(v, int) and not isinstance(v, bool)]
    for name, value in itertools.product(numbers, [1, 10**5] if case.option else [0, 1, 2, 10**5]):
        try:
            trial = Trial(dataclasses.replace(made(case), **{name: value}), tiny(*HEADS), HEADS, budget, 30, 4, 0)
            assert read(trial, trial.ids()).isfinite().all()
        except SaccadeError as error:
            assert re.search(rf"\b{name}={value}\b", str(error))


NOT_SERVED = {
    "a module without parameters": (lambda: torch.nn.Identity(), "Identity is not a model of transformers"),
    "a module": (lambda: torch.nn.Linear(2, 2), "Linear is not a model of transformers"),
    "no keys": (lambda: other("mamba", state_size=4), "attention|model"),
    "a window everywhere": (lambda: models.tiny("mistral", window=8), "every layer has a sliding window"),
    "an encoder": (lambda: other("t5", d_model=16, d_kv=8, d_ff=16, num_heads=2), "encoder-decoder"),
}


def other(kind, **shape):
    """A tiny model of a kind that is not attached to."""
    config = AutoConfig.for_model(kind, vocab_size=32, hidden_size=16, num_hidden_layers=2, num_layers=2, **shape)
    maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return maker.from_config(config).eval()


@functools.cache
def not_served(what):
    """The same one for every method."""
    return NOT_SERVED[what][0]()


@pytest.mark.claims("errors")
@pytest.mark.parametrize("what", NOT_SERVED)
def test_13_a_model_without_the_parts(plain, what):
    text = NOT_SERVED[what][1]
    with pytest.raises(CannotRun, match=text) as error:
        attach(not_served(what), plain.method())
    assert error.value.exit_code == 3 and plain.name in str(error.value)


@pytest.mark.claims("errors")
def test_13_one_part_has_one_owner(plain):
    both = [made(plain)] * 2
    if not plain.parts:
        attach(tiny(*HEADS), both).detach()
        return
    with pytest.raises(DoesNotCompose, match=rf"{plain.name}, {plain.name}.*both need the part '{plain.parts[0]}'"):
        attach(tiny(*HEADS), both)


@pytest.mark.claims("errors")
def test_13_learning_and_what_was_learnt(plain, tmp_path, monkeypatch):
    """Nothing to learn, nothing learnt, nothing to learn from, learnt from another model, a file that is cut short."""
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    model, name = tiny(*HEADS), plain.name
    if not plain.card.calibrated:
        with pytest.raises(CannotRun, match=f"calibrate {name}: it has nothing to learn"):
            saccade.calibrate(model, name, [tokens(8)])
        return
    with pytest.raises(BadInput, match="no samples"):
        saccade.calibrate(model, name, [])
    reasons = explain(model, plain.method())
    assert all(f"saccade calibrate {name}" in reason for reason in reasons)
    learnt = made(plain).artefact
    foreign = dataclasses.replace(plain.method(), artefact=dataclasses.replace(learnt, fingerprint="0" * 12))
    with pytest.raises(CannotRun, match=f"made for .*{fingerprint(model)}.*saccade calibrate {name}"):
        attach(model, foreign)
    small = tiny(6, 2, 16)
    misfit = dataclasses.replace(learnt, fingerprint=fingerprint(small), tensors={
        n: t[:1] for n, t in learnt.tensors.items()
    })  # fmt: skip
    with pytest.raises(CannotRun, match="here: "):
        attach(small, dataclasses.replace(plain.method(), artefact=misfit))
    file = learnt.save(tmp_path / "artefacts" / name / "mine")
    attach(model, plain.method()).detach()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(BadArtefact, match=r"mine\.safetensors.*cannot be read"):
        attach(model, plain.method())


@pytest.mark.claims("errors")
def test_13_nan_in_a_query_stays_to_be_seen(case):
    """A row whose query is NaN gives NaN, as dense attention does; no choice turns it into a number."""
    if "observe" in case.parts:
        pytest.skip("the model itself computes under a probe")
    plain, model, cut = Engine.forward, tiny(*HEADS), 20

    def forward(self, layer, q, k, v, real):
        q = q.clone()
        q[:, :, -1] = torch.nan
        return plain(self, layer, q, k, v, real)

    for budget in (1.0, *case.budgets[:3]):
        with mock.patch.object(Engine, "forward", forward), attach(model, made(case), budget=budget):
            out = in_pieces(model, tokens(cut + 3), [cut])
        assert out[0, [cut - 1, cut + 2]].isnan().all()
