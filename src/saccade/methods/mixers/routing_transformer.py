"""Routing Transformer: centroids that are learnt online send queries and keys that belong together to each other."""

from __future__ import annotations

import itertools
import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Mixer, Slot
from saccade.core.selection import Buckets, Gather, Selection, Spans, dense
from saccade.methods.mixers._pieces import fresh, in_pieces
from saccade.methods.mixers._places import placed
from saccade.methods.mixers._routing import Learning, normed, taken

SMOOTHING = 1e-5  # added to the size of every cluster


class RoutingTransformer(Mixer):
    """Half of the heads attends to the newest tokens, the other half inside of clusters of like tokens.

    Queries and keys are layer-normed (causally they are the same, k = q) and compared with the centroids mu:
    cluster c has the w tokens of largest x . mu_c, in the order of time, and attends to itself alone, causally:
    o_t = mean over the clusters c that hold t of  softmax_{j in c}(q_t . k_j / sqrt(d)) v_j;  in none: 0.
    Centroids follow the means of the tokens nearest to them,  mu <- decay mu + (1 - decay) mean,  after every backward
    pass of a layer in training; tokens are pulled towards them by  commitment mean |x - mu(x)|^2.

    clusters: how many centroids a head has
    window_tokens: w, and what a local head sees, up to the token itself; 0: a cluster's share of the tokens there are
    local_heads: heads that are local; None: half of them
    strict_causal: a token has the cluster nearest to it alone, and sees the newest w of it; nothing then depends on
        later tokens, on which membership in the w best does
    decay: of the moving means
    commitment: weight of the pull, added to the gradient as if to the loss

    Raises:
        BadOption: no cluster, more local heads than heads, or strict_causal where tokens see later ones.
    Source: arXiv 2003.05997, sections 4 and 5; google-research, routing_transformer/utils.py.
    """

    card = Card(
        name="routing-transformer",
        title="Efficient Content-Based Sparse Attention with Routing Transformers",
        family="mixers",
        paper="arXiv:2003.05997",
        year=2021,
        authors="Roy, Saffar, Vaswani, Grangier",
        official="google-research/google-research",
        licence_of_official="Apache-2.0",
        summary="Online k-means groups like tokens, which attend to each other; the other heads are local.",
        equation="o_t = mean_{c holds t} softmax_{j in c}(q_t . k_j / sqrt(d)) v_j",
        budget="none is taken: the pairs follow from the clusters and the window",
        takes_budget=False,
        departures=(
            "Logits are divided by sqrt(d). The authors divide by nothing after the norm, so that a token, whose key is"
            " its query, mostly sees itself.",
            "Positions are rotary, as in all layers of our nets, and enter the logits only; the authors add learnt"
            " relative positions.",
            "Local heads have a sliding window; the authors' see their own block and the one before.",
            "The mean over clusters is one; the authors add 0.01 to the count.",
            "The commitment is added to the gradient of queries and keys, so that any training loop has it, and the"
            " centroids move with the backward pass, not with the forward one.",
        ),
        lacks={
            "chunks": "the best tokens of a cluster are chosen among all that are there; with strict_causal and"
            " window_tokens pieces, steps and one pass agree",
            "causality": "whether a token is among the best of a cluster depends on later ones; with strict_causal it"
            " does not",
        },
    )

    def __init__(
        self,
        slot: Slot,
        *,
        clusters: int = 4,
        window_tokens: int = 0,
        local_heads: int | None = None,
        strict_causal: bool = False,
        decay: float = 0.999,
        commitment: float = 1e-4,
    ):
        super().__init__(slot)
        self.local = slot.heads // 2 if local_heads is None else local_heads
        self.clusters, self.window, self.strict = clusters, window_tokens, strict_causal
        self.decay, self.commitment = decay, commitment
        self.head_size = slot.channels // slot.heads
        self._check()
        routed = slot.heads - self.local
        self.qkv = torch.nn.Linear(slot.channels, self.head_size * (3 * slot.heads - routed * slot.causal), bias=False)
        self.out = torch.nn.Linear(slot.channels, slot.channels, bias=False)
        self.register_buffer("sums", normed(torch.randn(routed, clusters, self.head_size)))
        self.register_buffer("counts", torch.ones(routed, clusters))
        self.last: list[tuple[Selection, int]] = []  # of the newest forward, with their heads
        self.dense_pairs = 1

    def _check(self) -> None:
        if self.clusters < 1:
            raise BadOption("routing-transformer.clusters=0", "it takes at least 1", "Give a number of centroids.")
        if not 0 <= self.local <= self.slot.heads:
            found = f"the layer has {self.slot.heads} heads"
            raise BadOption(f"routing-transformer.local_heads={self.local}", found, "Give as many at most.")
        if self.strict and not self.slot.causal:
            asked = "routing-transformer.strict_causal=True"
            raise BadOption(asked, "tokens see later ones in this net", "Leave it away.")

    def forward(self, x, state=None, lengths=None):
        state = state or fresh(x, self.slot.heads)
        out, state = in_pieces(*self._heads(x, lengths), state, lengths, self._attend)
        return self.out(rearrange(out, "b h n d -> b n (h d)")), state

    def density(self):
        pairs = sum(float(selection.count().mean()) * heads for selection, heads in self.last)
        return pairs / (self.slot.heads * self.dense_pairs) if self.last else None

    def reference(self, x):
        """Head by head and query by query, members of a cluster found by sorting all tokens."""
        q, k, v = self._heads(x, None)
        turned_q, turned_k = (placed(y, torch.arange(x.shape[1]), self.slot) for y in (q, k))
        out = torch.zeros_like(v)
        for b, h in itertools.product(range(len(x)), range(self.slot.heads)):
            count = [0] * x.shape[1]
            for t, seen in self._seen(q[b, h].detach(), k[b, h].detach(), h - self.local):
                weights = (turned_k[b, h, seen] @ turned_q[b, h, t] / math.sqrt(self.head_size)).softmax(0)
                out[b, h, t] = (out[b, h, t] * count[t] + weights @ v[b, h, seen]) / (count[t] + 1)
                count[t] += 1
        return self.out(rearrange(out, "b h n d -> b n (h d)"))

    def _seen(self, q: Float[Tensor, "n d"], k: Float[Tensor, "n d"], head: int):
        """(query, keys it sees) of a head, once for each cluster that holds the query; local heads are below 0."""
        n, causal = len(q), self.slot.causal
        window = self._width(n)
        if head < 0:
            yield from ((t, [j for j in range(n) if abs(t - j) < window and (j <= t or not causal)]) for t in range(n))
            return
        scores = [x @ self.centroids()[head].T for x in (q, k)]
        if self.strict:
            own = scores[1].argmax(-1)
            yield from ((t, [j for j in range(t + 1) if own[j] == own[t]][-window:]) for t in range(n))
            return
        for c in range(self.clusters):
            asking, asked = (sorted(sorted(range(n), key=lambda t: -float(s[t, c]))[:window]) for s in scores)
            yield from ((t, [j for j in asked if j <= t or not causal]) for t in asking)

    # --- learning -------------------------------------------------------------------------------------------------

    def centroids(self) -> Float[Tensor, "r c d"]:
        """Layer-normed, as tokens are compared with them."""
        total = self.counts.sum(-1, keepdim=True)
        smooth = (self.counts + SMOOTHING) / (total + self.clusters * SMOOTHING) * total
        return normed(self.sums / smooth[..., None])

    def pull(
        self, points: Float[Tensor, "b r n d"], real: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b r n d"], Float[Tensor, "b r n c"]]:
        """Gradient of the commitment loss, and the nearest centroid of each point, all zero where there is none."""
        mu, mask = self.centroids(), real[:, None, :, None]
        nearest = (points @ mu.mT).argmax(-1)
        chosen = torch.nn.functional.one_hot(nearest, self.clusters).to(points) * mask
        away = torch.where(mask, points - chosen @ mu, 0.0)
        return 2 * self.commitment * away / (mask.sum() * points.shape[1]).clamp(min=1), chosen

    def learn(self, points: Float[Tensor, "b r n d"], chosen: Float[Tensor, "b r n c"]) -> None:
        """Let the centroids follow the points that are nearest to them."""
        real = torch.where(chosen.any(-1, keepdim=True), points, 0.0)
        self.counts.lerp_(chosen.sum((0, 2)), 1 - self.decay)
        self.sums.lerp_(torch.einsum("brnc,brnd->rcd", chosen, real), 1 - self.decay)

    # --- attention ------------------------------------------------------------------------------------------------

    def _heads(self, x: Tensor, lengths: Int[Tensor, " b"] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, local heads first, without positions; those of routing heads normed."""
        heads, local, n, causal = self.slot.heads, self.local, x.shape[1], self.slot.causal
        made = rearrange(self.qkv(x), "b n (h d) -> b h n d", d=self.head_size)
        q, v, k = made[:, :heads], made[:, heads : 2 * heads], made[:, 2 * heads :]
        points = normed(q[:, local:] if causal else torch.cat([q[:, local:], k[:, local:]], 2))
        if self.training and local < heads:
            ends = torch.full((len(x),), n, device=x.device) if lengths is None else lengths.to(x.device)
            real = torch.arange(n, device=x.device) < ends[:, None]
            points = Learning.apply(points, real if causal else real.repeat(1, 2), self)
        q = torch.cat([q[:, :local], points[:, :, :n]], 1)
        return q, torch.cat([k[:, :local], points[:, :, -n:]], 1), v

    def _width(self, n: int) -> int:
        return min(n, self.window or max(1, n // self.clusters))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new, n, local = q.shape[2], k.shape[2], self.local
        at = torch.arange(n, device=k.device)
        turned_q, turned_k = placed(q, at[n - new :], self.slot), placed(k, at, self.slot)
        self.last, self.dense_pairs = [], dense(new, n, self.slot.causal).dense_pairs
        parts = []
        if local:
            window = torch.full((1,), self._width(n), device=q.device)
            near = Spans(sinks=window * 0, window=window, queries=new, keys=n, causal=self.slot.causal)
            parts.append(self._compute(turned_q[:, :local], turned_k[:, :local], v[:, :local], near))
        if local < self.slot.heads:
            attend = self._nearest if self.strict else self._best
            parts.append(attend(*(x[:, local:] for x in (q, k, turned_q, turned_k, v))))
        return torch.cat(parts, 1)

    def _best(self, q: Tensor, k: Tensor, turned_q: Tensor, turned_k: Tensor, v: Tensor) -> Tensor:
        """The w best tokens of every cluster, each cluster by itself; a token has the mean over its clusters."""
        new, w = q.shape[2], self._width(k.shape[2])
        if self.slot.causal:
            q, turned_q = k, turned_k  # they are the same, and older ones ask as well: clusters may have changed
        asking, asked = self._members(q, min(w, q.shape[2])), self._members(k, w)
        buckets = [torch.arange(x.shape[2], device=x.device) // (x.shape[2] // self.clusters) for x in (asking, asked)]
        q_bucket, k_bucket = (x.int()[None, None] for x in buckets)
        shape = {"queries": asking.shape[2], "keys": asked.shape[2], "causal": self.slot.causal}
        inside = Buckets(q_bucket=q_bucket, k_bucket=k_bucket, **shape)
        o = self._compute(taken(turned_q, asking), taken(turned_k, asked), taken(v, asked), inside)
        total = torch.zeros_like(turned_q).scatter_add(2, asking[..., None].expand_as(o), o)
        count = torch.zeros_like(turned_q[..., 0]).scatter_add(2, asking, torch.ones_like(o[..., 0]))
        return (total / count.clamp(min=1)[..., None])[:, :, -new:]

    def _members(self, x: Float[Tensor, "b r n d"], w: int) -> Int[Tensor, "b r m"]:
        """The w best of each cluster, cluster by cluster, in the order of time; of equals the first."""
        scores = (x.detach() @ self.centroids().mT).mT
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :w].sort(-1).values.flatten(2)

    def _nearest(self, q: Tensor, k: Tensor, turned_q: Tensor, turned_k: Tensor, v: Tensor) -> Tensor:
        """The newest w tokens of the token's own cluster: a range where they are sorted by cluster and time."""
        new, n = q.shape[2], k.shape[2]
        own = (k.detach() @ self.centroids().mT).argmax(-1)
        clusters, order = own.sort(dim=-1, stable=True)
        ends = order.argsort(-1) + 1
        starts = torch.maximum(torch.searchsorted(clusters, own), ends - self._width(n))
        ranges = torch.stack([starts, ends], -1)[:, :, n - new :, None].int()
        none = torch.full((*ranges.shape[:3], 0), -1, dtype=torch.int32, device=q.device)
        newest = Gather(index=none, ranges=ranges, queries=new, keys=n, causal=False)
        return self._compute(turned_q, taken(turned_k, order), taken(v, order), newest)

    def _compute(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
        self.last.append((selection, q.shape[1]))
        return ops.attend(q, k, v, selection)[0]
