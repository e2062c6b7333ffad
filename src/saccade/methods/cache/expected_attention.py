"""Expected Attention: keys are kept by the attention that queries to come are expected to pay, times what they add."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.site import Seen, Site

PIECE = 512  # positions that are averaged over at a time


@dataclass(frozen=True)
class ExpectedAttention(Cache):
    """Keep the prompt keys that queries of the tokens to come will probably attend to.

    Queries before their rotation are nearly normal, q ~ N(mu, Sigma) in each head, and those to come are like those of
    the prompt, rotated to the next T positions, on average by R. What a key can expect of them has a closed form:
    z_j = E exp(q.k_j / sqrt(d)) = exp((R mu).k_j / sqrt(d) + k_j^T R Sigma R^T k_j / 2d);
    s_j = (softmax(log z)_j + epsilon) ||v_j||.  No query of the answer is consulted.

    sink_tokens: first tokens, left out of all statistics and always kept
    sample_tokens: last prompt queries that mu and Sigma are taken from
    future_tokens: T, next positions that the rotation is averaged over
    covariance: whether Sigma counts; without it the mean query stands for all
    epsilon: attention that every key gets besides; the larger, the more its value counts

    Raises:
        BadOption: no sampled query, no future position, or an epsilon below 0.
    Source: arXiv 2510.00636, section 2.2; NVIDIA/kvpress, presses/expected_attention_press.py.
    """

    card = Card(
        name="expected-attention",
        title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        family="cache",
        paper="arXiv:2510.00636",
        year=2025,
        authors="Devoto, Jeblick, Jegou",
        official="NVIDIA/kvpress",
        licence_of_official="Apache-2.0",
        summary="Each head keeps the keys that queries to come can be expected to attend to, times the value's norm.",
        equation="s_j = (softmax(R mu . k / sqrt(d) + k^T R Sigma R^T k / 2d)_j + epsilon) ||v_j||",
        budget="keys per head that remain of the prompt, the first tokens included",
        needs=("queries",),
        departures=(
            "mu and Sigma are those of the queries themselves, turned back to position 0; the authors' code computes"
            " them from the hidden states before the projection, which is the same where the projection is linear.",
            "At most the last 2,048 prompt queries are sampled, so that the others need not be held; the authors take"
            " all but the first four.",
            "The paper's equation weighs by the norm of W_o v, its experiments and code by that of v, and so do we.",
            "epsilon is 0 as in the code; the paper's experiments have 0.02, those with needles 0. Budgets that heads"
            " share, which the paper adds, are not part of this.",
            "Compressed once, at the end of the prompt; the paper also compresses while generating.",
        ),
        lacks={
            "chunks": "what is dropped at the end of the prompt is not found by tokens read later, as it is in one pass"
            " over everything; a prompt given in chunks is scored at its end and agrees",
        },
    )

    sink_tokens: int = 4
    sample_tokens: int = 2048
    future_tokens: int = 512
    covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("sample_tokens", "future_tokens"):
            if getattr(self, name) < 1:
                raise BadOption(f"expected-attention.{name}=0", "there would be no query", "Give at least 1.")
        if not 0 <= self.epsilon < math.inf:
            raise BadOption(f"expected-attention.epsilon={self.epsilon}", "it takes a number from 0", "Leave it away.")

    @property
    def observe_tokens(self) -> int:
        return self.sample_tokens

    def check(self, site: Site) -> list[str]:
        reasons = []
        if site.turn is None:
            reasons.append(f"layer {site.layer}: how it marks positions is not known, so no query can be moved ahead")
        if site.softcap is not None:
            reasons.append(f"layer {site.layer}: of logits capped at {site.softcap} the mean has no closed form")
        return reasons

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        assert seen.queries is not None, "the card asks for queries"
        sinks = min(self.sink_tokens, site.keys)
        kind = torch.promote_types(seen.keys.dtype, torch.float32)
        keys, values = (x[:, :, sinks:].to(kind) for x in (seen.keys, seen.values))
        mean, spread = self._ahead(seen.queries[:, :, max(0, seen.queries.shape[2] - keys.shape[2]) :].to(kind), site)
        mean, spread = (x.unflatten(1, (site.kv_heads, site.group)) for x in (mean, spread))
        logits = site.scale * torch.einsum("bgsd,bgkd->bgsk", mean, keys)
        if self.covariance:
            logits += site.scale**2 / 2 * torch.einsum("bgske,bgke->bgsk", keys[:, :, None] @ spread, keys)
        worth = (logits.softmax(-1).mean(2) + self.epsilon) * values.norm(dim=-1)
        return pad(worth, (sinks, 0), value=torch.inf)

    def _ahead(self, q: Float[Tensor, "b h w d"], site: Site) -> tuple[Tensor, Tensor]:
        """R mu [b h d] and R Sigma R^T [b h d d], of the last queries of the prompt."""
        assert site.turn is not None, "check refuses to run without"
        q = site.turn(q, torch.arange(site.seen - q.shape[2], site.seen, device=q.device).neg())
        mean = q.mean(2)
        rest = q - mean[:, :, None]
        turned = self._mean_turn(q, site)
        return mean @ turned, turned.mT @ (rest.mT @ rest / max(1, q.shape[2])) @ turned

    def _mean_turn(self, like: Tensor, site: Site) -> Float[Tensor, "d d"]:
        """R^T: row i is where unit i goes, on average over the next T positions."""
        assert site.turn is not None, "check refuses to run without"
        d = like.shape[-1]
        units = torch.eye(d, dtype=like.dtype, device=like.device)[None, :, None]
        total = torch.zeros_like(units[0, :, 0])
        for part in torch.arange(site.seen, site.seen + self.future_tokens, device=like.device).split(PIECE):
            total += site.turn(units.expand(1, d, len(part), d), part)[0].sum(1)
        return total / self.future_tokens
