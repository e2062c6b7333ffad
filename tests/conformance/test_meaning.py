"""Properties 1 to 3: what a method computes is dense attention over the pairs it says, within what it was given."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch

from tests.conformance.cases import ANY, LAYERS, drawn, tiny, trials
from tests.conformance.runs import assert_same, own, read, read_padded, watch
from tests.helpers import assert_no_worse
from tests.methods.handmade import in_pieces, tokens, under_mask


@pytest.mark.claims("full-budget")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@drawn(2)
def test_01_full_budget_equals_dense(case, dtype, data):
    """In each precision at most twice as wrong as the model's own attention is."""
    if not case.budgets:
        pytest.skip(f"{case} takes no budget: its sizes are fixed")
    trial = data.draw(trials(case, full=True))
    exact, theirs = without_us(trial.heads, dtype, trial.prompt, trial.rest)
    low = dataclasses.replace(trial, model=tiny(*trial.heads, dtype))
    assert_no_worse(read(low, trial.ids()), exact, theirs, f"{case} at full budget")


@functools.cache  # methods meet the same examples
def without_us(heads, dtype, prompt, rest):
    """Logits in float64 of the weights as the low precision has them, and PyTorch's own in that precision."""
    ids = tokens(prompt + rest)
    return in_pieces(as_exact(heads, dtype), ids, [prompt]), own(tiny(*heads, dtype), ids, [prompt])


@functools.cache
def as_exact(heads, dtype):
    """The weights as the low precision has them, computing in float64."""
    return copy.deepcopy(tiny(*heads, dtype)).double()


@pytest.mark.claims("mask")
@drawn(4)
def test_02_output_equals_dense_under_its_mask(case, data):
    """A dense pass of the whole model under the pairs that the method chose and kept gives the same logits."""
    trial = data.draw(trials(case, prompts=ANY))
    seen = watch(trial)
    oracle = under_mask(trial.model, trial.ids(), lambda layer, q, k: seen.masks[layer])
    assert_same(seen.logits, oracle, trial)


@pytest.mark.claims("budget")
@drawn()
def test_03_achieved_is_within_the_request(case, data):
    """What is held of a prompt, else the pairs it computed; and the keys that later queries read; over all layers."""
    trial = data.draw(trials(case, prompts=ANY))
    seen, n, end = watch(trial), trial.prompt, trial.prompt + trial.rest
    places = LAYERS * trial.heads[0]
    if "evict" in case.parts or not case.parts:
        held = sum(len(p) for layer in seen.held for p in layer)
        assert held <= trial.allowed.tokens(n, bytes_per_token(trial)) * LAYERS * trial.heads[1]
    elif "prefill" in case.parts:
        assert sum(int(m[..., :n, :].sum()) for m in seen.masks) <= pairs(trial.allowed, n) * places
    if "decode" in case.parts:
        reads = sum(int(m[..., n:, :].sum()) for m in seen.masks)
        assert reads <= sum(trial.allowed.tokens(t) for t in range(n + 1, end + 1)) * places


def pairs(budget, n):
    """Pairs per head that a prompt of n tokens may compute; a query has at least one key."""
    if budget.unit == "fraction":
        return max(n, budget.amount * n * (n + 1) / 2)
    return sum(min(t, budget.tokens(n)) for t in range(1, n + 1))


def bytes_per_token(trial):
    """Keys and values of one token in every head of every layer."""
    return 2 * LAYERS * trial.heads[1] * trial.heads[2] * trial.model.dtype.itemsize


@pytest.mark.claims("keys")
@drawn(2)
def test_03_every_query_has_a_key(case, data):
    trial = data.draw(trials(case, prompts=ANY))
    assert all(m.any(-1).all() for m in watch(trial).masks)


@drawn()
def test_03_every_head_has_a_key_and_the_record_counts_the_pairs(case, data):
    """The last tokens of a prompt, and all later ones, have one in every method."""
    trial = data.draw(trials(case, prompts=ANY))
    seen, n, end = watch(trial), trial.prompt, trial.prompt + trial.rest
    assert all(m[..., n - 1 :, :].any(-1).all() for m in seen.masks)
    assert all(len(p) for layer in seen.held for p in layer)
    rows = {"prefill": (slice(0, n), n * (n + 1) / 2), "decode": (slice(n, end), (end * (end + 1) - n * (n + 1)) / 2)}
    for stage, (part, dense) in rows.items():
        computed = sum(int(m[..., part, :].sum()) for m in seen.masks)
        assert seen.record.density(stage) == pytest.approx(computed / (dense * LAYERS * trial.heads[0]))


@drawn()
def test_03_a_row_that_begins_empty_works(case, data):
    """A context of no token: a row of the prompt is all padding, and what follows is a context of its own."""
    trial = data.draw(trials(case))
    rows = [trial.ids()[0, : trial.prompt], trial.ids()[0, :0]]
    rest = trial.ids(name=7)[0, trial.prompt :]
    for budget in (trial.budget, 1.0):
        with trial.attach(budget=budget):
            after_nothing = read_padded(trial.model, rows, [rest, rest], "left")[1]
        assert after_nothing.isfinite().all()
    if case.budgets:
        assert_same(after_nothing, in_pieces(trial.model, rest[None], [1]), trial)
