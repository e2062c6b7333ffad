"""Full attention: every query reads every key before it. What all other methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.core.card import Card
from saccade.core.method import Method


@dataclass(frozen=True)
class Full(Method):
    """Change nothing:  o = softmax(q K^T / sqrt(d)) V  over all keys.

    It owns no part, so the model runs through the same attachment as with any method, and dense; the difference to the
    model alone is the attachment's own cost.
    """

    card = Card(
        name="full",
        title="Full attention",
        family="sparse",
        paper="",
        year=2017,
        summary="Every query reads every key before it; nothing is left out, whatever the budget.",
        equation="o = softmax(q K^T / sqrt(d)) V",
        budget="of no effect: it always computes and keeps everything, as the record says",
        baseline=True,
        lacks={"budget": "it is the baseline that the budgets of others are measured against"},
    )
