"""Scatterbrain: hashing finds the pairs that are computed exactly, random features stand for all the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core import rng
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Gather, Selection, dense
from saccade.core.site import Site

MOST_HASHES = 16
LEAST = 1e-24  # of the features' sum: below 0 it is rounding


@dataclass(frozen=True)
class Scatterbrain(Sparse):
    """Exact entries on a sparse support, a product of random features elsewhere, and one normalisation for both.

    A_ij = e^{s_ij} on the support S_i,  phi(q_i) . phi(k_j) elsewhere;  o_i = sum_j A_ij v_j / sum_j A_ij,  where
    phi(x) = m^{-1/2} exp([W x, -W x] - |x|^2 / 2),  so that  E[phi(q) . phi(k)] = e^{q.k}  (x scaled by d^{-1/4}).
    The second part is the linear attention over all keys less its own share on the support, and is merged with the
    first by log-sum-exp. Every entry is unbiased.

    support: "hash": queries and keys of equal rank, by projections on random lines, in some hash; "window": the latest
    hashes: how many lines
    exact_share: of a row's budget for exact keys; for the rest there are as many features as it pays for keys. 1: no
        second part; 0: the query's own key alone is exact

    Raises:
        BadOption: no hash or too many of them, or a share outside [0, 1].
    Source: arXiv 2110.15343, algorithm 1 and section 4; HazyResearch/scatterbrain, sblocal_attention.py,
    sbsmyrf_attention.py.
    """

    card = Card(
        name="scatterbrain",
        title="Scatterbrain: Unifying Sparse and Low-rank Attention Approximation",
        family="sparse",
        paper="arXiv:2110.15343",
        year=2021,
        authors="Chen, Dao, Winsor, Song, Rudra, Re",
        official="HazyResearch/scatterbrain",
        licence_of_official="Apache-2.0",
        summary="Pairs that hash alike are exact; random features stand for all others; both under one softmax.",
        equation="A_ij = e^{q.k} on the support, phi(q).phi(k) elsewhere",
        budget="keys of a row computed exactly and features, together; a feature counts as a key. The record counts the"
        " exact pairs. 1 is dense",
        departures=(
            "By default half of a row's budget is exact keys and half is features; the authors set both numbers.",
            "A query's own key is always exact, so that every row has an exact part.",
            "A pair that several hashes find is listed once; the authors find it in each, and divide: the same.",
            "Half of the keys of equal rank lie behind a query and are not seen, so that lists are drawn twice as long"
            " as the budget pays for; where more can be seen the latest stay. The authors do not hash causally.",
            "A window ends at the query; the authors centre it and left the causal case unchecked.",
            "Features are drawn once for each layer and shared by its heads, as theirs; theirs may be drawn anew in"
            " training.",
            "Attention while decoding is dense.",
        ),
        lacks={
            "mask": "features stand for the pairs that are not computed: it is dense attention under no mask",
            "chunks": "how many keys and features a row has follows from the prompt's length, and ranks from all of it",
            "causality": "queries and keys are sorted together, so which early pairs are exact follows from later ones",
        },
    )

    support: Literal["hash", "window"] = "hash"
    hashes: int = 2
    exact_share: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.hashes <= MOST_HASHES:
            asked = f"scatterbrain.hashes={self.hashes}"
            raise BadOption(asked, f"it takes 1 to {MOST_HASHES}", "The authors have 2 to 4.")
        if not 0 <= self.exact_share <= 1:
            asked = f"scatterbrain.exact_share={self.exact_share}"
            raise BadOption(asked, "it takes a share of the budget, from 0 to 1", "Leave it away for a half.")

    def check(self, site: Site) -> list[str]:
        reasons = super().check(site)
        if site.softcap is not None:
            reasons.append(f"logits are capped at {site.softcap}, and features estimate the exponential of plain ones")
        return reasons

    def sizes(self, site: Site) -> tuple[int, int]:
        """Exact keys and features of a row; all keys: dense."""
        row = site.budget.row_tokens(site.keys)
        if row >= site.keys:
            return site.keys, 0
        exact = max(1, math.ceil(self.exact_share * row))
        return exact, (row - exact) // 2 * 2

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        exact, _ = self.sizes(site)
        if exact >= site.keys:
            return dense(site.queries, site.keys)
        own = torch.arange(site.offset, site.keys, device=q.device, dtype=torch.int32)[:, None]
        if self.support == "window":
            index = own - torch.arange(exact, device=q.device, dtype=torch.int32).flip(0)
            index = index[None, None].clamp(min=-1)
        else:
            found = self._alike(q.detach(), k.detach(), exact, site)
            index = _once(torch.cat([found, own.expand(*q.shape[:3], 1)], -1))[..., -exact:]
        return Gather(index=index, queries=site.queries, keys=site.keys)

    def attend(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], v: Float[Tensor, "b g k d"], site: Site
    ) -> Float[Tensor, "b h q d"]:
        selection, (_, features) = self.select(q, k, site), self.sizes(site)
        out, lse = site.partial(q, k, v, selection)
        if not features or not isinstance(selection, Gather):
            return out
        rest = self._rest(q, k, v, selection, self.directions(features, site), site)
        return ops.merge_lse([out.to(rest[0].dtype), rest[0]], [lse, rest[1]])[0].to(q.dtype)

    def directions(self, features: int, site: Site) -> Float[Tensor, "m d"]:
        """W of a layer: half as many directions as there are features."""
        draw = rng.generator("scatterbrain/features", site.seed, site.layer, features)
        return ops.orthogonal_directions(features // 2, site.head_size, draw)

    def lines(self, site: Site) -> Float[Tensor, "hashes d+2"]:
        """What queries and keys are projected on, in each hash."""
        draw = rng.generator("scatterbrain/lines", site.seed, site.layer)
        return torch.randn(self.hashes, site.head_size + 2, generator=draw, dtype=torch.float64)

    def _rest(
        self, q: Tensor, k: Tensor, v: Tensor, selection: Gather, directions: Float[Tensor, "m d"], site: Site
    ) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
        """The features' attention over what is not selected, and the logarithm of its sum; -inf is never reached."""
        q, k = (ops.log_features(x, directions, site.scale) for x in (q, k))
        top_q, top_k = q.detach().amax(-1, keepdim=True), k.detach().amax((-2, -1), keepdim=True)
        total, weight = ops.linear_attend(torch.exp(q - top_q), torch.exp(k - top_k), v, without=selection)
        weight = weight.clamp(min=LEAST)
        scale = top_q + top_k.repeat_interleave(site.group, 1)
        return total / weight[..., None], torch.log(weight) + scale[..., 0]

    def _alike(self, q: Tensor, k: Tensor, exact: int, site: Site) -> Int[Tensor, "b h q l"]:
        """For each query the keys of its cluster in every hash; -1: behind it, or none.

        Vectors are made equally long first, [q, 0, r], [k, r', 0], so that those nearest to a query are its largest
        logits. Both are sorted by their projections and cut into equally many clusters of equal size.
        """
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k.repeat_interleave(site.group, 1)))
        lines, lists = self.lines(site).to(q), []
        square_q, square_k = (x.square().sum(-1) for x in (q, k))
        length = square_q.amax(-1, keepdim=True) + square_k.amax(-1, keepdim=True)
        rest_q, rest_k = (torch.sqrt((length - square).clamp(min=0)) for square in (square_q, square_k))
        n, size = site.keys, min(site.keys, -(-2 * exact // self.hashes))
        clusters = max(1, n // size)
        start = -(-torch.arange(clusters + 1, device=q.device) * n // clusters)  # ranks r of cluster r clusters // n
        longest = -(-n // clusters)
        at = torch.arange(site.offset, n, device=q.device)[:, None]
        for line in lines:
            rank = (q @ line[:-2] + rest_q * line[-1]).argsort(dim=-1, stable=True).argsort(-1)
            order = (k @ line[:-2] + rest_k * line[-2]).argsort(dim=-1, stable=True)
            mine = rank * clusters // site.queries
            place = start[mine][..., None] + torch.arange(longest, device=q.device)
            found = torch.take_along_dim(order, place.clamp(max=n - 1).flatten(2), -1).view_as(place)
            lists.append(torch.where((place < start[mine + 1][..., None]) & (found <= at), found, -1).int())
        return torch.cat(lists, -1)


def _once(index: Int[Tensor, "b h q l"]) -> Int[Tensor, "b h q l"]:
    """Ascending, -1 first, each key once."""
    index = index.sort(-1).values
    again = torch.nn.functional.pad(index[..., 1:] == index[..., :-1], (1, 0))
    return index.masked_fill(again, -1).sort(-1).values
