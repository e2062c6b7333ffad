"""S2-Attention: every head sees its neighbourhood and a shard of the rest; the shards together are the whole text."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.budget import FULL
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.selection import Blocks, Selection, dense
from saccade.core.site import Site


class Shards(NamedTuple):
    """Which key blocks a head sees: the last `local` up to the query's own, and every `stride`-th, from its own first
    on; stride 0: no others. Blocks are counted from the text's beginning."""

    block: int
    local: int
    stride: int
    step: int

    def first(self, head: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The first column of a head: (j + head step) mod stride = 0."""
        return (-head * self.step) % max(self.stride, 1)

    def columns(self, head: Int[Tensor, "*n"], blocks: Int[Tensor, "*n"] | int) -> Int[Tensor, "*n"]:
        """How many of a head's columns lie in the first so many blocks."""
        if not self.stride:
            return torch.zeros_like(head + blocks)
        return ((blocks - self.first(head) + self.stride - 1) // self.stride).clamp(min=0)

    def held(self, heads: int, tokens: int) -> int:
        """Keys of all heads that the token after so many may see."""
        gone = max(0, tokens // self.block - self.local + 1)
        columns = int(self.columns(torch.arange(heads), gone).sum())
        return heads * (tokens - gone * self.block) + columns * self.block


@dataclass(frozen=True)
class S2Attention(Cache):
    """Key block j is seen from query block i by key/value head h  iff  j <= i  and

        i - j < local   or   (j + h step) mod stride = 0,   step = max(1, floor(stride / heads)).

    Columns do not move: a block that a head no longer sees it will never see again, and its keys are dropped. With as
    many heads as the stride is long, every block is seen by some head. Made to be trained with: `attach`, then train.

    block_tokens: of a block; under a budget smaller powers of two where it pays for less than four
    local_blocks: at most, the query's own among them; under a budget half of it at most, but two blocks
    vert_stride: every so many-th block is a head's; 0: the shortest stride that the budget pays for
    homo_head: all heads see the same columns, those of the first
    dense_layers: first layers that see everything; under a budget the others pay for it

    Raises:
        BadOption: no block, or none that is local.
    Source: arXiv 2407.17678, section 3; linxihui/dkernel.
    """

    rolling: ClassVar[bool] = True
    card = Card(
        name="s2-attention",
        title="S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
        family="sparse",
        paper="arXiv:2407.17678",
        year=2024,
        authors="Lin, Zhang, Ge, Zhang, Chen, Lan, Wang, Duan, Yang, Wang and others",
        official="linxihui/dkernel",
        licence_of_official="MIT",
        summary="Each head sees a local band and its own stripe of blocks; over the heads the stripes cover the text.",
        equation="on(i, j, h): i - j < local or (j + h step) mod stride = 0",
        budget="mean keys per head that are held at the end of the prompt, which sets the stride; with vert_stride none"
        " is taken",
        departures=(
            "The stride follows from the budget unless it is given; the authors' library has 4 local blocks and a"
            " stride of 4, their benchmarks 8 and 16.",
            "The step between heads counts key/value heads, which the stripes belong to; the authors count query heads,"
            " so that few key/value heads have stripes side by side.",
            "homo_head gives all heads the first one's stripe; the authors' gives none if key/value heads are grouped.",
            "Keys that a head will not see again are dropped as tokens come; the authors leave that to the server.",
            "Dense layers are the first ones, as the paper advises; Phi-3-small has every other layer dense.",
            "The masked logits are minus infinity, not minus a million.",
        ),
        lacks={
            "chunks": "without a vert_stride the stride follows from the prompt's length, known only at its end",
            "gqa": "every key/value head has its own stripe, so heads written out have others",
        },
    )

    block_tokens: int = 64
    local_blocks: int = 4
    vert_stride: int = 0
    homo_head: bool = False
    dense_layers: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("block_tokens", "local_blocks"):
            if getattr(self, name) < 1:
                raise BadOption(f"s2-attention.{name}=0", "it takes at least 1", "Leave it away for the authors'.")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "evict")

    def check(self, site: Site) -> list[str]:
        if self.vert_stride and site.budget != FULL:
            given = f"vert_stride={self.vert_stride} says what is seen, and would ignore the budget {site.budget}"
            return [f"{given}; give one of the two"]
        return site.budget.unpaid(site.layers, self.dense_layers)

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        site.state["prompt"] = torch.full((q.shape[0],), site.seen)  # on the host, where it is asked for
        shards = self.shards(site.seen, site)
        if shards is None:
            return dense(site.queries, site.keys)
        return _blocks(shards, site, q.device)

    def visible(
        self, q_position: Int[Tensor, "r q"], k_position: Int[Tensor, "r k"], head: Int[Tensor, " r"], site: Site
    ) -> Bool[Tensor, "r q k"]:
        out = torch.ones(*q_position.shape, k_position.shape[1], dtype=torch.bool, device=q_position.device)
        prompt = site.state.get("prompt", torch.zeros(len(head), dtype=torch.long))  # 0: a row that began empty
        for n in prompt.unique().tolist():
            shards, rows = self.shards(n, site), (prompt == n).to(head.device)
            if shards is None:
                continue
            i, j = q_position[rows, :, None] // shards.block, k_position[rows, None] // shards.block
            out[rows] = i - j < shards.local
            if shards.stride:
                first = shards.first(head[rows] + site.shard.rank * site.kv_heads)
                out[rows] |= (j - first[:, None, None]) % shards.stride == 0
        return out

    def shards(self, prompt: int, site: Site) -> Shards | None:
        """What the heads of this layer see after a prompt of so many tokens; None: everything."""
        if self.vert_stride:
            if site.layer < self.dense_layers:
                return None
            return self._of(self.block_tokens, self.local_blocks, self.vert_stride, site.all_kv_heads)
        n = max(prompt, 1)
        held = site.budget.layer_tokens(n, site.layer, site.layers, self.dense_layers, site.bytes_per_token)
        if held >= n:
            return None
        key = n, held, site.all_kv_heads
        if key not in self._found:
            self._found[key] = self._fit(*key)
        return self._found[key]

    @functools.cached_property
    def _found(self) -> dict[tuple[int, int, int], Shards]:
        """Patterns that were worked out: every token asks again."""
        return {}

    def _fit(self, prompt: int, held: int, heads: int) -> Shards:
        """With the shortest stride that the budget pays for, or none: the cost falls as strides grow, but for the
        columns that happen to be at the edge, so the last that was seen to be paid for is taken."""
        block = min(self.block_tokens, 1 << max(0, (held // 4).bit_length() - 1))
        local = max(2, min(self.local_blocks, held // (2 * block)))  # two: the one before is full when one begins
        low, high = 0, prompt // block + 1
        best = self._of(block, local, 0, heads)
        while high - low > 1:
            middle = (low + high) // 2
            some = self._of(block, local, middle, heads)
            if some.held(heads, prompt) <= heads * held:
                high, best = middle, some
            else:
                low = middle
        return best

    def _of(self, block: int, local: int, stride: int, heads: int) -> Shards:
        return Shards(block, local, stride, 0 if self.homo_head else max(1, stride // heads))


def coverage(shards: Shards, heads: int) -> float:
    """The share of blocks that some head sees from far away."""
    if not shards.stride:
        return 0.0
    return len(set(shards.first(torch.arange(heads)).tolist())) / shards.stride


def _blocks(shards: Shards, site: Site, device: torch.device) -> Blocks:
    """The pattern as compressed rows, written down without a table of blocks by blocks.

    In a row the columns that lie before the band come first, then the band.
    """
    size = math.gcd(shards.block, site.offset)  # rows of a later piece of a prompt need not begin with a block
    head = site.shard.mine(torch.arange(site.all_kv_heads, device=device))
    row = (torch.arange(0, site.queries, size, device=device) + site.offset) // shards.block
    far = shards.columns(head[:, None], (row - shards.local + 1).clamp(min=0))
    ends = (far + (row + 1).clamp(max=shards.local)).cumsum(-1)
    crow = torch.nn.functional.pad(ends, (1, 0))
    most = int(crow[:, -1].max()) if len(row) else 0
    entry = torch.arange(most, device=device).expand(site.kv_heads, -1).contiguous()
    at = torch.searchsorted(ends, entry, right=True).clamp(max=max(len(row) - 1, 0))
    rank, before = entry - crow.gather(1, at), far.gather(1, at)
    column = shards.first(head)[:, None] + rank * shards.stride
    near = (row[at] - shards.local + 1).clamp(min=0) + rank - before
    col = torch.where(rank < before, column, near).masked_fill(entry >= ends[:, -1:], -1)
    crow, col = (x.int().repeat_interleave(site.group, 0)[None] for x in (crow, col))
    return Blocks(crow=crow, col=col, q_block=size, k_block=shards.block, queries=site.queries, keys=site.keys)
