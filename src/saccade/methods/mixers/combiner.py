"""Combiner: every token attends to all others, to near ones directly and to far ones through summaries of regions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Mixer, Slot
from saccade.core.selection import Buckets, Gather
from saccade.methods.mixers._pieces import alike
from saccade.methods.nets._attention import turned

CHOICES = {
    "pattern": ("fixed", "logsparse", "axial"),
    "pooling": ("max", "mean", "deepsets"),
    "row_summary": ("proj", "wsum", "none"),
}
Region = tuple[list[int], int]  # its tokens, and the one whose query sums them up; -1: their pooled query


class Combiner(Mixer):
    """One softmax over the keys near a query and one key for each far region; a region's mass goes to its tokens.

    p(j|i) ~ e^{q_i.k_j}  for j in D_i,   e^{q_i.K_R} p(j|R)  for j in a region R,   p(j|R) = softmax_{j in R}(Q_R.k_j),
    logits over sqrt(d);  o_i = sum_j p(j|i) v_j = sum_{D_i} P v_j + sum_R P_R V_R,  V_R = sum_j p(j|R) v_j.
    Near and far are two calls of attention, merged by log-sum-exp. D_i and the regions are all that i may see.

    pattern: "fixed": i's own segment, and all others; "logsparse": i itself, and beside it blocks of 1, 2, 4, ...
        tokens; "axial": i's own row, and the other rows, each as the token of i's column in it attends to its row
    segment_tokens: of a segment, and of a row where the tokens are no picture's
    pooling: Q_R and K_R are the largest or the mean of each channel, or the largest of relu(W x); not of "axial"
    row_summary: K_R of "axial": a learnt map of V_R, the same mean of keys, or the token's own key

    Raises:
        BadOption: no tokens to a segment, a value that no option has, or heads whose channels cannot be turned.
    Source: arXiv 2107.05768, sections 3 and 4; google-research/combiner, jax/model/layer.py.
    """

    card = Card(
        name="combiner",
        title="Combiner: Full Attention Transformer with Sparse Computation Cost",
        family="mixers",
        paper="arXiv:2107.05768",
        year=2021,
        authors="Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai",
        official="google-research/google-research",
        licence_of_official="Apache-2.0",
        summary="Near tokens directly, far ones through a learnt summary of their region, all under one softmax.",
        equation="p(j|i) = P_i(j) if near, P_i(R) p(j|R) if j is in the far region R",
        budget="none: what is computed follows from the pattern and the length of a segment or row",
        takes_budget=False,
        departures=(
            "Queries and keys have rotary positions, as all mixers of our nets; the authors add learnt ones.",
            "The map of row_summary='proj' is one matrix for each head, turned like a key; the authors put a residual"
            " and a norm between two. The mixture of five axial groups is not built.",
            "Both ways a region is any other segment, row, or the block that a block of 2^l tokens has beside it; the"
            " paper writes out the causal case.",
            "A last row that is too short has the summary of its last token in the columns that it lacks; the authors"
            " ask for lengths that divide.",
            "A step makes all summaries anew, which takes as long as a dense step; the authors' code only trains.",
        ),
    )

    def __init__(
        self,
        slot: Slot,
        *,
        pattern: Literal["fixed", "logsparse", "axial"] = "fixed",
        segment_tokens: int = 16,
        pooling: Literal["max", "mean", "deepsets"] = "max",
        row_summary: Literal["proj", "wsum", "none"] = "proj",
    ):
        super().__init__(slot)
        for name, value in (("pattern", pattern), ("pooling", pooling), ("row_summary", row_summary)):
            if value not in CHOICES[name]:
                found = f"it takes {' or '.join(map(repr, CHOICES[name]))}"
                raise BadOption(f"combiner.{name}={value!r}", found, "Give one of these.")
        if segment_tokens < 1:
            raise BadOption(f"combiner.segment_tokens={segment_tokens}", "it takes at least 1", "Leave it away for 16.")
        self.size, pairs = slot.channels // slot.heads, 4 if slot.grid else 2
        if self.size % pairs:
            asked = f"combiner in heads of {self.size} channels"
            raise BadOption(asked, "they cannot be turned in pairs", f"Give a multiple of {pairs}.")
        self.pattern, self.pooling, self.row_summary = pattern, pooling, row_summary
        self.row = slot.grid[1] if slot.grid and pattern == "axial" else segment_tokens
        self.qkv = torch.nn.Linear(slot.channels, 3 * slot.channels, bias=False)
        self.out = torch.nn.Linear(slot.channels, slot.channels, bias=False)
        if pattern == "axial" and row_summary == "proj":
            self.map = torch.nn.Parameter(torch.eye(self.size).repeat(slot.heads, 1, 1))
        if pattern != "axial" and pooling == "deepsets":
            self.deep = torch.nn.ModuleList(torch.nn.Linear(self.size, self.size, bias=False) for _ in "qk")

    def forward(self, x, state=None, lengths=None):
        count = torch.zeros(len(x), dtype=torch.long, device=x.device)
        state = state or {"history": x.new_zeros(len(x), self.slot.heads, 0, 3 * self.size), "count": count}
        before = state["count"]
        real = torch.full_like(before, x.shape[1]) if lengths is None else lengths.to(before.device)
        new = self._heads(x, before)
        out = torch.zeros_like(new[..., : self.size])
        history = new.new_zeros(*new.shape[:2], int((before + real).max()), new.shape[3])
        for rows, old, many in alike(before, real):
            whole = torch.cat([state["history"][rows, :, :old], new[rows, :, :many]], 2)
            history[rows, :, : old + many] = whole
            if many:
                out[rows, :, :many] = self._mixed(*whole.chunk(3, -1), many)
        return self._joined(out), {"history": history, "count": before + real}

    def reference(self, x):
        """p(j|i) of all pairs, times the values."""
        return self._joined(self.distribution(x) @ self._heads(x).chunk(3, -1)[2])

    def _joined(self, out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        return self.out(rearrange(out, "b h n d -> b n (h d)"))

    def _heads(self, x: Tensor, before: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b h n 3d"]:
        """Queries, keys and values, the first two turned by their positions."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.slot.heads)
        before = torch.zeros(len(x), dtype=torch.long, device=x.device) if before is None else before
        axes = self._axes(before[:, None] + torch.arange(x.shape[1], device=x.device))
        return torch.cat([turned(q, axes), turned(k, axes), v], -1)

    def _axes(self, at: Int[Tensor, "b n"]) -> list[Int[Tensor, "b n"]]:
        return [at] if self.slot.grid is None else [at // self.slot.grid[1], at % self.slot.grid[1]]

    # --- near and far -----------------------------------------------------------------------------------------------

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, many: int) -> Float[Tensor, "b h many d"]:
        """What comes of the last so many tokens."""
        n = q.shape[2]
        asking = q[:, :, -many:]
        near = ops.attend(asking, k, v, self._near(n, many, self.slot.causal))
        keys, values = (self._rows if self.pattern == "axial" else self._regions)(q, k, v)
        lists = self._lists(n, q.device)[-many:][None, None]
        far = ops.attend(asking, keys, values, Gather(index=lists, queries=many, keys=keys.shape[2], causal=False))
        return ops.merge_lse(*zip(near, far))[0]

    def _near(self, n: int, many: int, causal: bool) -> Buckets:
        """Own segment or row; of "logsparse" the token itself."""
        size = 1 if self.pattern == "logsparse" else self.row
        piece = torch.arange(n, device=self.qkv.weight.device)[None, None] // size
        return Buckets(q_bucket=piece[..., n - many :], k_bucket=piece, queries=many, keys=n, causal=causal)

    def _lists(self, n: int, device: torch.device) -> Int[Tensor, "n regions"]:
        """Which regions each token sees, -1: none, as `_regions` and `_rows` number them."""
        at = torch.arange(n, device=device)[:, None]
        if self.pattern == "logsparse":
            index, first = [], 0
            for level in range((n - 1).bit_length()):
                block, blocks = at >> level, -(-n // 2**level)
                there = block % 2 == 1 if self.slot.causal else (block ^ 1) < blocks
                index.append(torch.where(there, first + (block ^ 1), -1))
                first += blocks
            return torch.cat([at[:, :0], *index], 1).int()
        region = torch.arange(-(-n // self.row), device=device)
        there = region < at // self.row if self.slot.causal else region != at // self.row
        places = (region * self.row + at % self.row).clamp(max=n - 1) if self.pattern == "axial" else region
        return torch.where(there, places, -1).int()

    def _regions(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K_R and V_R of all segments, or of the blocks of all levels behind one another."""
        n = q.shape[2]
        log = self.pattern == "logsparse"
        sizes = [2**level for level in range((n - 1).bit_length())] if log else [self.row]
        both = [self._summed(q, k, v, size) for size in sizes]
        keys, values = zip(*both) if both else ([k[:, :, :0]], [v[:, :, :0]])
        return torch.cat(keys, 2), torch.cat(values, 2)

    def _summed(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
        n = q.shape[2]
        blocks = -(-n // size)
        real = (torch.arange(blocks * size, device=q.device) < n).view(blocks, size)
        q, k, v = (_padded(x, blocks * size).unflatten(2, (blocks, size)) for x in (q, k, v))
        summary, keys = (self._pooled(x, real, i) for i, x in enumerate((q, k)))
        logits = torch.einsum("bhrd,bhrtd->bhrt", summary, k) / math.sqrt(self.size)
        wide = torch.promote_types(v.dtype, torch.float32)
        weights = logits.masked_fill(~real, -torch.inf).softmax(-1, dtype=wide).to(v.dtype)
        return keys, torch.einsum("bhrt,bhrtd->bhrd", weights, v)

    def _pooled(self, x: Float[Tensor, "*r t d"], real: Bool[Tensor, "*t"], which: int) -> Float[Tensor, "*r d"]:
        """Q_R (which: 0) or K_R (1)."""
        if self.pooling == "mean":
            return x.masked_fill(~real[..., None], 0.0).sum(-2) / real.sum(-1, keepdim=True)
        x = self.deep[which](x).relu() if self.pooling == "deepsets" else x
        return x.masked_fill(~real[..., None], -torch.inf).amax(-2)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K_R and V_R of each token's own row, as that token attends to it."""
        n = q.shape[2]
        rows = self._near(n, n, causal=False)
        values = ops.attend(q, k, v, rows)[0]
        keys = {"none": lambda: k, "wsum": lambda: ops.attend(q, k, k, rows)[0], "proj": lambda: self._mapped(values)}
        return keys[self.row_summary](), values

    def _mapped(self, values: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        at = torch.arange(values.shape[2], device=values.device)[None]
        return turned(values @ self.map, self._axes(at))

    # --- written out ------------------------------------------------------------------------------------------------

    def regions(self, i: int, n: int) -> Iterator[Region]:
        """The far regions of token i of n."""
        if self.pattern == "logsparse":
            for level in range((n - 1).bit_length()):
                size, block = 2**level, (i >> level) ^ 1
                members = list(range(block * size, min(n, (block + 1) * size)))
                if members and (block < i >> level or not self.slot.causal):
                    yield members, -1
            return
        mine = i // self.row
        for r in range(-(-n // self.row)):
            members = list(range(r * self.row, min(n, (r + 1) * self.row)))
            if r < mine or (r > mine and not self.slot.causal):
                yield members, min(members[0] + i % self.row, n - 1) if self.pattern == "axial" else -1

    def distribution(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n n"]:
        """p(j|i), pair by pair."""
        q, k, v = self._heads(x).chunk(3, -1)
        n = x.shape[1]
        return torch.stack([torch.stack([self._row(q, k, v, i, n, h) for i in range(n)], 1)
                            for h in range(q.shape[1])], 1)  # fmt: skip

    def _row(self, q: Tensor, k: Tensor, v: Tensor, i: int, n: int, h: int) -> Float[Tensor, "b n"]:
        q, k, v = q[:, h], k[:, h], v[:, h]
        size = 1 if self.pattern == "logsparse" else self.row
        near = [j for j in range(i // size * size, min(n, (i // size + 1) * size)) if j <= i or not self.slot.causal]
        logits, given = [(q[:, i, None] * k[:, near]).sum(-1)], [torch.eye(n).to(q)[near].expand(len(q), -1, -1)]
        for members, at in self.regions(i, n):
            real = torch.ones(len(members), dtype=torch.bool)
            asks = q[:, at] if at >= 0 else self._pooled(q[:, members], real, 0)
            weights = ((asks[:, None] * k[:, members]).sum(-1) / math.sqrt(self.size)).softmax(-1)
            key = self._key(k, v, members, weights, at, h) if at >= 0 else self._pooled(k[:, members], real, 1)
            logits.append((q[:, i] * key).sum(-1, keepdim=True))
            given.append((weights[:, :, None] * torch.eye(n).to(q)[members]).sum(1, keepdim=True))
        share = (torch.cat(logits, 1) / math.sqrt(self.size)).softmax(-1)
        return (share[:, :, None] * torch.cat(given, 1)).sum(1)

    def _key(self, k: Tensor, v: Tensor, members: list[int], weights: Tensor, at: int, h: int) -> Float[Tensor, "b d"]:
        """K_R of "axial"."""
        if self.row_summary == "none":
            return k[:, at]
        mean = (weights[:, :, None] * (k if self.row_summary == "wsum" else v)[:, members]).sum(1)
        if self.row_summary == "wsum":
            return mean
        axes = self._axes(torch.tensor([[at]], device=k.device))
        return turned((mean @ self.map[h])[:, None, None], axes)[:, 0, 0]


def _padded(x: Float[Tensor, "b h n d"], length: int) -> Float[Tensor, "b h length d"]:
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))
