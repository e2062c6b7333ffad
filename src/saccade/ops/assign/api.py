"""One choice for every item, at least cost, within limits on the mean use of several resources: a knapsack."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.errors import BadInput

STEPS = 40  # bisections of a price


@torch.no_grad()
def assign(
    cost: Float[Tensor, "groups items choices"],
    use: Float[Tensor, "resources choices"],
    limit: float,
    *,
    kinds: int = 0,
    least: float = 0.0,
) -> Int[Tensor, "groups items"] | None:
    """The choice of every item, so that the total cost is small and the mean use of each resource within the limit.

    kinds: different choices within a group, at most; 1, 2, or 0 for any number
    least: of plans found, those whose mean use of each resource reaches it come first

    By prices on use (Lagrange multipliers): at a price every item, or every group, chooses alone, and the price is
    bisected, for each mix of the resources in turn. What is then left of the limit is spent step by step where it saves
    most. The cost is the least there is up to the gap that prices leave, which shrinks with the number of items.
    None: not even the plan of least use keeps to the limit.

    Raises:
        BadInput: numbers that do not fit together, or more kinds than two.
    """
    alike = cost.dim() == 3 and use.dim() == 2 and cost.shape[-1] == use.shape[-1]
    if not alike or not cost.numel() or kinds not in (0, 1, 2):
        asked = f"assign costs {tuple(cost.shape)} with uses {tuple(use.shape)} and kinds={kinds}"
        raise BadInput(asked, "it takes [groups, items, choices], [resources, choices], and kinds of 0 to 2", "Do so.")
    cost, use = cost.double(), use.double()
    plans = [_spend(cost, use, limit, kinds, plan) for plan in _priced(cost, use, limit, kinds)]
    if not plans:
        return None
    return min(plans, key=lambda plan: (bool(_mean(use, plan).min() < least), float(_taken(cost, plan).sum())))


def _mean(use: Tensor, plan: Int[Tensor, "groups items"]) -> Float[Tensor, " resources"]:
    return use[:, plan.flatten()].mean(-1)


def _taken(cost: Tensor, plan: Int[Tensor, "groups items"]) -> Float[Tensor, "groups items"]:
    return cost.gather(-1, plan[..., None])[..., 0]


def _priced(cost: Tensor, use: Tensor, limit: float, kinds: int) -> list[Int[Tensor, "groups items"]]:
    """For each mix of the resources the plan of the lowest price at which it keeps to the limit."""
    resources = len(use)
    mixes = [torch.ones(resources, dtype=use.dtype) / resources, *torch.eye(resources, dtype=use.dtype)]
    plans = []
    for mix in mixes[: 1 if resources == 1 else None]:
        price = mix.to(use.device) @ use
        low, high, best = 0.0, 1.0, None
        for step in range(2 * STEPS):
            middle = high if best is None else (low + high) / 2
            plan = _cheapest(cost + middle * price, kinds)
            if bool((_mean(use, plan) <= limit + 1e-12).all()):
                best, high = plan, middle
            else:
                low, high = (middle, high) if best is not None else (high, 4 * high)
            if step >= STEPS and best is not None:
                break
        if best is not None:
            plans.append(best)
    return plans


def _cheapest(value: Float[Tensor, "groups items choices"], kinds: int) -> Int[Tensor, "groups items"]:
    """Every item's best choice; with one or two kinds, the best ones that a group can agree on."""
    if kinds == 0 or kinds >= value.shape[1] or kinds >= value.shape[2]:
        return value.argmin(-1)
    if kinds == 1:
        return value.sum(1).argmin(-1)[:, None].expand(value.shape[:2]).contiguous()
    pairs = torch.tensor(list(itertools.combinations(range(value.shape[2]), 2)), device=value.device)
    both = [torch.minimum(group[:, pairs[:, 0]], group[:, pairs[:, 1]]).sum(0).argmin() for group in value]
    pair = pairs[torch.stack(both)]
    mine = value.gather(-1, pair[:, None].expand(-1, value.shape[1], -1))
    return pair.gather(1, mine.argmin(-1))


def _spend(cost: Tensor, use: Tensor, limit: float, kinds: int, plan: Tensor) -> Int[Tensor, "groups items"]:
    """While anything that the limit allows saves cost, the change that saves most for what it uses."""
    plan, items = plan.clone(), plan.numel()
    while True:
        saved = _taken(cost, plan)[..., None] - cost
        more = (use[:, None, None] - use[:, plan][..., None]) / items
        fits = (more <= limit + 1e-12 - _mean(use, plan)[:, None, None, None]).all(0)
        gain = torch.where(fits & (saved > 0) & _allowed(plan, cost.shape[-1], kinds), saved, 0.0)
        rate = gain / more.amax(0).clamp(min=1e-9)
        at = int(rate.argmax())
        if not float(rate.flatten()[at]) > 0:
            return plan
        plan.view(-1)[at // cost.shape[-1]] = at % cost.shape[-1]


def _allowed(plan: Int[Tensor, "groups items"], choices: int, kinds: int) -> Bool[Tensor, "groups 1 choices"]:
    """Choices that a group has already, or any where it may have one more kind."""
    there = torch.nn.functional.one_hot(plan, choices).any(1)
    return (there | (kinds == 0) | (there.sum(-1, keepdim=True) < kinds))[:, None]
