"""The plan of least cost against all plans there are; limits; kinds in a group."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import BadInput
from tests.methods.handmade import noise

USE = torch.tensor([[0.2, 0.4, 0.5, 1.0], [0.1, 0.5, 0.6, 1.0]])


def falling(groups, items, name, use=USE):
    """Costs that fall as use grows, as those of longer windows do."""
    steps = noise(groups, items, use.shape[1], name=name).exp().double()
    return steps.flip(-1).cumsum(-1).flip(-1) - steps[..., -1:]


def every_plan(cost, use, limit, kinds):
    """Least cost over all plans within the limit, by looking at each."""
    groups, items, choices = cost.shape
    best = torch.inf
    for flat in itertools.product(range(choices), repeat=groups * items):
        plan = torch.tensor(flat).view(groups, items)
        fits = bool((use[:, plan.flatten()].double().mean(-1) <= limit + 1e-12).all())
        if fits and (not kinds or all(len(set(g.tolist())) <= kinds for g in plan)):
            best = min(best, float(cost.gather(-1, plan[..., None]).sum()))
    return best


@pytest.mark.parametrize("kinds", [0, 1, 2])
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.45, 0.7, 1.0]))
@settings(max_examples=8, deadline=None)
def test_a_plan_is_near_the_best_there_is(kinds, name, limit):
    """Within the gap that prices leave: the cost of changing one item, or one group where it must agree."""
    cost = falling(2, 2, str(name))
    plan = ops.assign(cost, USE, limit, kinds=kinds)
    assert plan.shape == (2, 2) and bool((USE[:, plan.flatten()].mean(-1) <= limit + 1e-6).all())
    assert not kinds or all(len(set(group.tolist())) <= kinds for group in plan)
    found, best = float(cost.gather(-1, plan[..., None]).sum()), every_plan(cost, USE, limit, kinds)
    gap = float((cost.amax(-1) - cost.amin(-1)).sum(-1).max() if kinds else (cost.amax(-1) - cost.amin(-1)).max())
    assert best - 1e-9 <= found <= best + gap


@given(st.integers(0, 10**6), st.integers(2, 7))
@settings(max_examples=8, deadline=None)
def test_where_prices_leave_no_gap_it_is_the_best(name, width):
    """One resource, costs that are convex in it, limits that prices reach: taking what saves most for its use."""
    use = torch.linspace(0.25, 1.0, 4)[None]
    saved = noise(2, 2, 3, name=str(name)).exp().double().sort(-1, descending=True).values
    cost = torch.nn.functional.pad(saved.flip(-1).cumsum(-1).flip(-1), (0, 1))
    limit = 0.25 + 0.75 * width / 12 + 1e-9
    plan = ops.assign(cost, use, limit)
    assert float(cost.gather(-1, plan[..., None]).sum()) == pytest.approx(every_plan(cost, use, limit, 0))


def test_the_whole_limit_is_spent_and_what_is_impossible_is_none():
    cost = falling(40, 4, "many")
    plan = ops.assign(cost, USE[:1], 0.6)
    assert 0.59 < float(USE[0, plan.flatten()].mean()) <= 0.6 + 1e-6
    assert ops.assign(cost, USE, 0.15) is None
    assert bool((ops.assign(cost, USE, 1.0) == 3).all())


def test_plans_that_use_enough_of_every_resource_come_first():
    use = torch.tensor([[0.5, 0.5], [0.1, 0.5]])
    cost = torch.tensor([[[0.0, 0.1]]])
    assert int(ops.assign(cost, use, 0.5)) == 0
    plans = {least: int(ops.assign(cost, use, 0.5, least=least)) for least in (0.05, 0.45)}
    assert plans[0.05] == 0  # none that was found uses more of the second, and the cheaper is taken
    assert plans[0.45] in (0, 1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match=r"costs \(2, 3\) .* it takes \[groups, items, choices\]"):
        ops.assign(torch.ones(2, 3), USE, 0.5)
    with pytest.raises(BadInput, match="kinds=3"):
        ops.assign(torch.ones(1, 2, 4), USE, 0.5, kinds=3)
