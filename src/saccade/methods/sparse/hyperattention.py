"""HyperAttention: hashing finds the large entries, uniform sampling stands for the others of each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Blocks, Buckets, Selection, Together, dense
from saccade.core.site import Site

TILE = 128  # segments of whole tiles are computed as blocks
MOST_BITS = 15


@dataclass(frozen=True)
class HyperAttention(Sparse):
    """Sort queries and keys by a hash, attend inside blocks of equal rank, sample the rest of each row.

    h(x) = rank of the bits [x P > 0];  rows sorted by h, cut into as many blocks as the keys;
    D_i = sum_{j in block(i)} e^{s_ij} + (n / m) sum_{j in S, not in block(i)} e^{s_ij},  the output alike.
    Causally, the prompt is halved until a piece has exact_tokens, which are attended to exactly; for the queries of
    every second half the keys of the first are approximated as above, and all is merged by log-sum-exp.

    sizes: "budget" fits the numbers below to the budget, "paper" takes them as they are
    block_tokens, sample_tokens: b and m, keys of a block and keys drawn; of "budget" only their ratio counts
    exact_tokens: pieces that are not halved; of "budget" as many times shorter as half of the pairs pays for
    projections: bits of the hash
    dense_layers: first layers that stay dense; of "budget" the others pay for them

    Raises:
        BadOption: an empty block or piece, or bits that do not fit into a number.
    Source: arXiv 2310.05869, algorithms 1 to 4; insuhan/hyper-attn, models/attention/hyper_attn.py.
    """

    card = Card(
        name="hyperattention",
        title="HyperAttention: Long-context Attention in Near-Linear Time",
        family="sparse",
        paper="arXiv:2310.05869",
        year=2024,
        authors="Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh",
        official="insuhan/hyper-attn",
        licence_of_official="Apache-2.0",
        summary="Blocks of queries and keys that hash alike are exact; sampled keys, weighted, stand for the others.",
        equation="D_i = sum_block e^s + (n / m) sum_sample e^s, merged by log-sum-exp",
        budget="pairs computed, those with sampled keys included",
        departures=(
            "By default sizes follow from the budget: exact pieces take at most half of the pairs. sizes='paper' has"
            " the authors' numbers.",
            "Halves are cut at multiples of exact_tokens, where the authors halve what there is and pad it.",
            "The m keys are drawn one from each of m equal runs of the hash order, so that none is drawn twice; the"
            " authors draw with replacement. Both are unbiased.",
            "A sampled key in the query's own block is left out always; the authors' flash path counts it twice.",
            "Blocks are of equal rank in both orders, sizes differing by one where they do not divide; the authors pad"
            " the last with zero keys that join the softmax.",
            "Buckets are in the order of the inverse Gray code, so that neighbours differ in one bit; the authors apply"
            " the code itself. Gradients reach the weights of the merge, which theirs detach in half precision.",
            "Values do not guide the sampling, as in the authors' code; in the paper they may.",
        ),
        lacks={
            "mask": "sampled pairs count for those that were not: it is dense attention under no mask",
            "chunks": "where the prompt is halved and what is drawn depends on its length",
            "causality": "queries are sorted together, so an early one's block follows from later ones",
        },
    )

    sizes: Literal["budget", "paper"] = "budget"
    block_tokens: int = 256
    sample_tokens: int = 256
    exact_tokens: int = 4096
    projections: int = 7
    dense_layers: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("block_tokens", "exact_tokens", "projections"):
            if getattr(self, name) < 1:
                asked = f"hyperattention.{name}=0"
                raise BadOption(asked, "it takes at least 1", "Leave it away for the authors' value.")
        if self.projections > MOST_BITS:
            asked = f"hyperattention.projections={self.projections}"
            raise BadOption(asked, f"it takes at most {MOST_BITS}", "Leave it away for the authors' 7.")

    def check(self, site: Site) -> list[str]:
        reasons, budget = super().check(site), site.budget
        if self.sizes == "paper" and budget != Budget(1.0):
            reasons.append(f"sizes='paper' computes what its sizes say, and would ignore the budget {budget}")
        elif self.dense_layers and budget.unit == "tokens":
            reasons.append(f"dense_layers={self.dense_layers} would exceed the budget {budget} of every row")
        return reasons if self.sizes == "paper" else reasons + budget.unpaid(site.layers, self.dense_layers)

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        exact, block, sample = self._sizes(site)
        if exact >= site.keys:
            return dense(site.queries, site.keys)
        at = torch.arange(site.keys, device=q.device)
        codes = self._codes(q, site), self._codes(k, site)
        parts: list[tuple[Selection, float]] = [(_exactly(exact, site, q.device), 1.0)]
        width = exact
        while width < site.keys and block:
            half, pair = at // width, at // (2 * width)
            asking = torch.where(half % 2 == 1, pair, -1)[site.offset :]
            asked = torch.where((half % 2 == 0) & ((2 * pair + 1) * width < site.keys), pair, -1)
            pairs = (site.keys + width - 1) // (2 * width)
            parts += self._approximately(codes, asking, asked, (pairs, width), (block, sample), site)
            width *= 2
        selections, times = zip(*parts)
        return Together(parts=selections, times=times, queries=site.queries, keys=site.keys)

    def without_order(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Together:
        """Every query over every key, as encoders attend, in the sizes of the options."""
        nodes = [torch.zeros(x.shape[2], dtype=torch.long, device=x.device) for x in (q, k)]
        codes, sizes = (self._codes(q, site), self._codes(k, site)), (self.block_tokens, self.sample_tokens)
        selections, times = zip(*self._approximately(codes, *nodes, (1, site.keys), sizes, site))
        return Together(parts=selections, times=times, queries=site.queries, keys=site.keys, causal=False)

    # --- sizes ------------------------------------------------------------------------------------------------------

    def _sizes(self, site: Site) -> tuple[int, int, int]:
        """Tokens of an exact piece, of a block and of a sample; a piece of all tokens is dense."""
        n, exact = site.keys, self.exact_tokens
        if site.layer < self.dense_layers:
            return n, 0, 0
        if self.sizes == "paper":
            return (n, 0, 0) if n < 2 * exact else (exact, self.block_tokens, self.sample_tokens)
        budget = site.budget
        if self.dense_layers and budget.amount < 1:
            budget = Budget((budget.amount * site.layers - self.dense_layers) / (site.layers - self.dense_layers))
        row = budget.row_tokens(n)
        if row >= n:
            return n, 0, 0
        pairs = row * n - row * (row - 1) // 2
        while _pairs_inside(n, exact) > max(pairs // 2, n):
            exact //= 2
        each = _share(pairs - _pairs_inside(n, exact), n, exact)
        block = -(-each * self.block_tokens // (self.block_tokens + self.sample_tokens))
        return exact, block, each - block

    # --- blocks and samples -----------------------------------------------------------------------------------------

    def _codes(self, x: Float[Tensor, "b h n d"], site: Site) -> Int[Tensor, "b h n"]:
        """The bucket of each token, buckets numbered so that neighbours differ in one bit."""
        draw = rng.generator("hyperattention/projections", site.seed, site.layer)
        projection = torch.randn(x.shape[-1], self.projections, generator=draw).to(x)
        code = torch.zeros(x.shape[:3], dtype=torch.int32, device=x.device)
        for i, bit in enumerate((x.detach() @ projection > 0).unbind(-1)):
            code += bit.int() << i
        for shift in (1, 2, 4, 8):
            code ^= code >> shift
        return code

    def _approximately(
        self,
        codes: tuple[Int[Tensor, "b h q"], Int[Tensor, "b g k"]],
        asking: Int[Tensor, " q"],
        asked: Int[Tensor, " k"],
        nodes: tuple[int, int],
        sizes: tuple[int, int],
        site: Site,
    ) -> Iterator[tuple[Buckets, float]]:
        """Queries of each node over its keys: those of their block, and a sample of the others with its weight.

        `asking`, `asked`: the node of each query and key, or -1. `nodes`: how many, and the keys of each.
        """
        (many, width), (block, sample) = nodes, sizes
        blocks = 1 if block + sample >= width else -(-width // block)
        q_order, q_bucket = self._sorted(codes[0], asking, many, blocks)
        k_order, k_bucket = (x.repeat_interleave(site.group, 1) for x in self._sorted(codes[1], asked, many, blocks))
        shape = {"queries": site.queries, "keys": site.keys, "causal": False}
        yield Buckets(q_bucket=q_bucket, k_bucket=k_bucket, q_order=q_order, k_order=k_order, **shape), 1.0
        sample = min(sample, width)
        if blocks == 1 or not sample:
            return
        first = site.keys - many * width + torch.arange(many, device=k_order.device) * width
        place = first[:, None] + self._drawn(width, sample, site)[:, None].to(k_order.device)
        drawn = k_order.gather(-1, place.flatten(1).expand(len(k_order), -1, -1))
        k_bucket = torch.full_like(k_bucket, -1).scatter(-1, drawn.long(), k_bucket.gather(-1, drawn.long()))
        yield (
            Buckets(q_bucket=q_bucket, k_bucket=k_bucket, q_order=q_order, k_order=drawn, family=blocks, **shape),
            width / sample,
        )

    def _sorted(
        self, code: Int[Tensor, "b h n"], node: Int[Tensor, " n"], many: int, blocks: int
    ) -> tuple[Int[Tensor, "b h n"], Int[Tensor, "b h n"]]:
        """Tokens by node and code, those of no node first; and the block of each, of equal size in its node."""
        key = torch.where(node >= 0, (node << self.projections) | code, -1)
        narrow = torch.int16 if many << self.projections <= 1 << 15 else torch.int32  # sorted in fewer passes
        order = key.to(narrow).sort(stable=True).indices
        there = node.sort().values
        left, right = (torch.searchsorted(there, there, right=side) for side in (False, True))
        rank = torch.arange(len(node), device=node.device) - left
        block = torch.where(there >= 0, there * blocks + rank * blocks // (right - left), -1).int()
        return order.int(), torch.empty_like(code).scatter_(-1, order, block.expand_as(order))

    def _drawn(self, width: int, sample: int, site: Site) -> Int[Tensor, "h m"]:
        """Ranks, ascending: one of each of `sample` runs that follow on one another from anywhere, around the end."""
        draw = rng.generator("hyperattention/sample", site.seed, site.layer, width)
        u = site.shard.mine(torch.rand(site.all_heads, sample + 1, generator=draw, dtype=torch.float64))
        run, place = width // sample, torch.arange(sample)
        rank = (u[:, :1] * width).long() + place * run + (u[:, 1:] * run).long()
        before = (rank < width).sum(-1, keepdim=True)  # from there on they are around the end, and the smallest
        return rank.gather(-1, (place + before) % sample) % width


def _exactly(exact: int, site: Site, device: torch.device) -> Selection:
    """Each piece of `exact` tokens by itself, causally."""
    shape = {"queries": site.queries, "keys": site.keys}
    if exact % TILE == 0 and site.offset % TILE == 0:
        tile = torch.arange(-(-site.keys // TILE), device=device)
        row = tile[site.offset // TILE :, None]
        keep = (tile <= row) & (tile >= row // (exact // TILE) * (exact // TILE))
        return Blocks.of(keep[None, None], q_block=TILE, k_block=TILE, **shape)
    at = torch.arange(site.keys, dtype=torch.int32, device=device)[None, None]
    piece, mine = at // exact, at[..., site.offset :]
    return Buckets(
        q_bucket=piece[..., site.offset :], k_bucket=piece, q_order=mine - site.offset, k_order=at, **shape
    )


def _pairs_inside(n: int, exact: int) -> int:
    """Pairs of the exact pieces of n tokens."""
    whole, rest = divmod(n, exact)
    return whole * (exact * (exact + 1) // 2) + rest * (rest + 1) // 2


def _share(pairs: int, n: int, width: int) -> int:
    """Keys for each query at every level, if all of them together compute so many pairs; none has more than a half."""
    asking = {}
    while width < n:
        whole, rest = divmod(n, 2 * width)
        asking[width] = whole * width + max(0, rest - width)
        width *= 2
    share = 0
    while asking and (share := pairs // sum(asking.values())) > min(asking):
        pairs -= min(asking) * asking.pop(min(asking))
    return share
