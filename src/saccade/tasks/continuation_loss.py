"""Next-token loss after the context was compressed: what a cache method forgets."""

from __future__ import annotations

from saccade.tasks.loss import Loss


class ContinuationLoss(Loss):
    """Mean loss in nats on 512 tokens of Moby-Dick that meet the compressed cache of the text before them."""

    name = "continuation-loss"
    title = "loss on 512 tokens after the context was compressed (query-agnostic)"
    metric = "nll"
    query_aware = False
    one_pass = False
    spread = 0.2
