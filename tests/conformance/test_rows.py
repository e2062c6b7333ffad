"""Properties 4, 5, 10 and 15: what a token's output may depend on, and what it may not."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.registry import get
from tests.conformance.cases import FEW, drawn, trials
from tests.conformance.runs import assert_same, read, read_padded, watch
from tests.methods.handmade import in_pieces


@pytest.mark.claims("padding")
@pytest.mark.parametrize("side", ["left", "right"])
@drawn(2)
def test_04_padding_changes_nothing_on_real_tokens(case, side, data):
    trial = data.draw(trials(case))
    short = data.draw(st.integers(1, trial.prompt))
    a, b = trial.ids(rows=2)
    prompts, rests = [a[: trial.prompt], b[:short]], [a[trial.prompt :], b[trial.prompt :]]
    with trial.attach():
        together = read_padded(trial.model, prompts, rests, side)
        alone = [in_pieces(trial.model, torch.cat(row)[None], [len(row[0])]) for row in zip(prompts, rests)]
    for i in range(2):
        assert_same(together[i], alone[i], trial, f"row {i}")


@pytest.mark.claims("batch")
@drawn()
def test_05_a_row_does_not_depend_on_its_neighbours(case, data):
    trial = data.draw(trials(case))
    rows = trial.ids(rows=3)
    together = read(trial, rows)
    assert_same(together[1:2], read(trial, rows[1:2]), trial)


@pytest.mark.claims("batch")
@drawn()
def test_05_a_row_does_not_depend_on_the_sample_before(case, data):
    """Bit for bit: the same shapes give the same numbers."""
    trial = data.draw(trials(case))
    with trial.attach():
        in_pieces(trial.model, trial.ids(name=3), [trial.prompt + 1])
        second = in_pieces(trial.model, trial.ids(), [trial.prompt])
    assert torch.equal(second, read(trial, trial.ids()))


@pytest.mark.claims("causality")
@drawn(6)
def test_10_no_prompt_token_depends_on_a_later_one(case, data):
    trial = data.draw(trials(case))
    last = data.draw(st.integers(1, 4))  # late changes: those that a choice made at the end of the prompt would show
    assert_unmoved(trial, trial.prompt - last)


@drawn()
def test_10_no_later_token_depends_on_one_after_it(case, data):
    """What is read after the prompt in one forward. No card excuses this: it would not be what `generate` does."""
    trial = data.draw(trials(case))
    assert_unmoved(trial, data.draw(st.integers(trial.prompt + 1, trial.prompt + trial.rest - 1)))


def assert_unmoved(trial, changed):
    """Other tokens from `changed` on leave the logits before it as they were."""
    ids = trial.ids()
    other = torch.cat([ids[:, :changed], trial.ids(name=11)[:, changed:]], 1)
    before, after = (read(trial, x)[:, :changed] for x in (ids, other))
    assert_same(after, before, trial, f"before token {changed}")


@pytest.mark.claims("seed")
@drawn()
def test_15_the_same_seed_gives_the_same_selection(case, data):
    """Whatever torch's own generator stands at, which nobody touches."""
    trial = data.draw(trials(case))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    first = watch(trial)
    torch.manual_seed(10)
    state = torch.get_rng_state()
    second = watch(trial)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(a, b) for a, b in zip(first.masks, second.masks))


@given(data=st.data())
@settings(FEW, max_examples=2)
def test_15_another_seed_matters_only_to_methods_that_draw(plain, data):
    trial = data.draw(trials(plain))
    others = [read(trial, trial.ids(), seed=seed) for seed in range(3)]
    same = all(torch.equal(others[0], x) for x in others)
    assert same or "site.seed" in inspect.getsource(inspect.getmodule(get(plain.name)))
