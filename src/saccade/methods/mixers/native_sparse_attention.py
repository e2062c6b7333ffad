"""Native Sparse Attention: blocks made small, the blocks that matter in full, and a window, mixed by learnt gates."""

from __future__ import annotations

import itertools
import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Mixer, Slot
from saccade.core.selection import Gather, Selection, Spans, dense
from saccade.methods.mixers._pieces import fresh, in_pieces
from saccade.methods.mixers._places import placed

BRANCHES = 3  # compressed, selected, window: each has keys and values of its own
FORCED = 3  # blocks that are always selected


class NativeSparseAttention(Mixer):
    """Three looks at the text under one query, each with its own keys and values, weighted by gates.

    o_t = sum_c g_c(x_t) attention(q_t, K_c, V_c),  g = sigmoid(W x_t).
    Compressed:  K_i = phi(k_{i d} .. k_{i d + l - 1}),  phi a small network that knows each key's place in its block.
    Selected: the n blocks of l' tokens of largest  p_j = sum_i p(K_i) |block i and block j|,  p the softmax over
    compressed keys, summed over the query heads of a key/value head; first, own and previous block always among them.
    Window: the newest w tokens. The choice has no gradient; it follows what the compressed look has learnt.

    block_tokens: l, of a block that is compressed to one key
    stride_tokens: d, from the first token of a compressed block to that of the next
    select_tokens: l', of a block that is selected
    select_blocks: n, blocks that are selected
    window_tokens: w, the token itself included
    kv_heads: key/value heads; the query heads of each select together

    Raises:
        BadOption: no window, less than three blocks, sizes that are no multiples of the stride, blocks to select that
            are shorter than those compressed, or heads that cannot be shared out.
    Source: arXiv 2502.11089, section 3; no official code.
    """

    card = Card(
        name="native-sparse-attention",
        title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
        family="mixers",
        paper="arXiv:2502.11089",
        year=2025,
        authors="Yuan, Gao, Dai, Luo, Zhao, Zhang, Xie, Wei, Wang, Xiao and others",
        summary="Compressed blocks, blocks selected by the attention to them, and a window, under learnt gates.",
        equation="o = sum_c g_c attention(q, K_c, V_c), c in compressed, selected, window",
        budget="none is taken: the pairs follow from the sizes of the three looks",
        takes_budget=False,
        departures=(
            "Sizes are a quarter of the paper's, for nets that read hundreds of tokens; theirs are l 32, d 16, l' 64,"
            " n 16, w 512.",
            "Gates are one linear layer and a sigmoid; the paper has a small network.",
            "Keys are compressed before they get their positions, and the result has that of the block's first token;"
            " the paper does not say.",
            "Compressed keys are made anew from the stored ones when pieces follow; the result is the same.",
            "One kernel of ours for each look, not the paper's kernel for groups of heads.",
        ),
    )

    def __init__(
        self,
        slot: Slot,
        *,
        block_tokens: int = 8,
        stride_tokens: int = 4,
        select_tokens: int = 16,
        select_blocks: int = 4,
        window_tokens: int = 32,
        kv_heads: int = 1,
    ):
        super().__init__(slot)
        self.block, self.stride, self.window, self.kv_heads = block_tokens, stride_tokens, window_tokens, kv_heads
        self.select_tokens, self.select_blocks = select_tokens, select_blocks
        self.head_size = slot.channels // slot.heads
        self._check()
        channels, e, stored = slot.channels, self.head_size, BRANCHES * kv_heads * self.head_size
        self.q, self.kv = nn.Linear(channels, channels, bias=False), nn.Linear(channels, 2 * stored, bias=False)
        self.gates, self.out = nn.Linear(channels, BRANCHES * slot.heads), nn.Linear(channels, channels, bias=False)
        self.where = nn.Parameter(torch.randn(2, block_tokens, e) * e**-0.5)
        self.phi = nn.ModuleList(
            nn.Sequential(nn.Linear(block_tokens * e, 2 * e), nn.GELU(), nn.Linear(2 * e, e)) for _ in range(2)
        )
        self.last: list[Selection] = []  # of the newest forward
        self.dense_pairs = 1

    def _check(self) -> None:
        block, select, name = self.block, self.select_tokens, "native-sparse-attention"
        if self.stride < 1 or min(block, select) < 1 or block % self.stride or select % self.stride:
            asked = f"{name} with blocks of {block} and {select} tokens, one every {self.stride}"
            raise BadOption(asked, "both must be multiples of the stride", "Give such sizes.")
        if select < block:
            asked, found = f"{name}.select_tokens={select}", f"blocks of {block} tokens are compressed"
            raise BadOption(asked, found, "Select blocks that are as long at least.")
        if self.select_blocks < FORCED:
            asked = f"{name}.select_blocks={self.select_blocks}"
            raise BadOption(asked, f"{FORCED} of them are always selected", "Give as many at least.")
        if self.window < 1:
            raise BadOption(f"{name}.window_tokens={self.window}", "it takes at least 1", "Give the token itself.")
        if self.kv_heads < 1 or self.slot.heads % self.kv_heads:
            found = f"{self.slot.heads} heads are not shared out evenly"
            raise BadOption(f"{name}.kv_heads={self.kv_heads}", found, "Give a divisor of them.")

    def forward(self, x, state=None, lengths=None):
        x = x.contiguous()  # or what has a bias rounds otherwise
        if lengths is not None:  # padding has gates, too
            at = torch.arange(x.shape[1], device=x.device)[:, None]
            x = x.masked_fill(at >= lengths.to(x.device)[:, None, None], 0.0)
        q, k, v = self._heads(x)
        state = state or fresh(x, self.slot.heads) | {"keys": k[:, :, :0], "values": v[:, :, :0]}
        looks, state = in_pieces(q.repeat(1, BRANCHES, 1, 1), k, v, state, lengths, self._attend)
        return self._mixed(looks, x), state

    def density(self):
        """Compressed keys are keys, and what two looks see counts twice."""
        return sum(float(s.count().mean()) for s in self.last) / self.dense_pairs if self.last else None

    # --- the equations, query by query ----------------------------------------------------------------------------

    def reference(self, x):
        """Query by query, block by block."""
        q, k, v = self._heads(x)
        n, group = x.shape[1], self.slot.heads // self.kv_heads
        q, out = placed(q, torch.arange(n), self.slot), torch.zeros_like(q).repeat(1, BRANCHES, 1, 1)
        for b, g in itertools.product(range(len(x)), range(self.kv_heads)):
            looks = self._looks(*(y[b, g :: self.kv_heads] for y in (k, v)))
            for t in range(n):
                said = self._row(q[b, g * group : g * group + group, t], looks, t, n)
                for c, h in itertools.product(range(BRANCHES), range(group)):
                    out[b, c * self.slot.heads + g * group + h, t] = said[h][c]
        return self._mixed(out, x)

    def _looks(self, k: Float[Tensor, "3 n d"], v: Float[Tensor, "3 n d"]) -> list[tuple[Tensor, Tensor]]:
        """Keys with positions, and values, of each look."""
        starts = range(0, k.shape[1] - self.block + 1, self.stride)
        small = [
            torch.stack([phi((x[0, s : s + self.block] + where).flatten()) for s in starts]) if starts else x[0, :0]
            for x, phi, where in zip((k, v), self.phi, self.where)
        ]
        keys, at = [small[0], *k[1:]], [list(starts), *[list(range(k.shape[1]))] * 2]
        keys = [placed(x[None, None], torch.tensor(a), self.slot)[0, 0] for x, a in zip(keys, at)]
        return list(zip(keys, [small[1], *v[1:]]))

    def _row(self, q: Float[Tensor, "s d"], looks: list, t: int, n: int) -> list[list[Tensor]]:
        def shares(head: Tensor, keys: Tensor) -> Tensor:
            return (keys @ head / math.sqrt(self.head_size)).softmax(0)

        causal = self.slot.causal
        ended = [i for i in range(len(looks[0][0])) if i * self.stride + self.block - 1 <= t or not causal]
        together = sum(shares(head, looks[0][0][ended]) for head in q)
        near = [j for j in range(n) if abs(t - j) < self.window and (j <= t or not causal)]
        there = ended, self._chosen(dict(zip(ended, together.tolist())), t, n), near
        return [[shares(head, x[seen]) @ y[seen] for (x, y), seen in zip(looks, there)] for head in q]

    def _chosen(self, shares: dict[int, float], t: int, n: int) -> list[int]:
        """Tokens of the blocks that are selected."""
        size, own, causal = self.select_tokens, t // self.select_tokens, self.slot.causal
        worth = [sum(p * self._common(i, j) for i, p in shares.items()) for j in range(-(-n // size))]
        forced = {0, max(own - 1, 0), own}
        others = [j for j in range(own + 1 if causal else len(worth)) if j not in forced]
        best = sorted(others, key=lambda j: -worth[j])[: self.select_blocks - len(forced)]
        inside = [x for j in sorted({*forced, *best}) for x in range(j * size, min(n, j * size + size))]
        return [x for x in inside if x <= t or not causal]

    def _common(self, i: int, j: int) -> int:
        """Tokens that compressed block i and block j of the selection have in common."""
        (a, b), (c, d) = (i * self.stride, self.block), (j * self.select_tokens, self.select_tokens)
        return max(0, min(a + b, c + d) - max(a, c))

    # --- attention ------------------------------------------------------------------------------------------------

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and keys and values, look by look; without positions."""
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.slot.heads)
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, d=self.head_size)
        return q, k, v

    def _mixed(self, looks: Float[Tensor, "b 3h n d"], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Under the gates of each token and head."""
        gates = rearrange(self.gates(x).sigmoid(), "b n (c h) -> b (c h) n 1", c=BRANCHES)
        return self.out(rearrange(gates * looks, "b (c h) n d -> c b n (h d)", c=BRANCHES).sum(0))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The three looks, behind one another along the axis of heads; `q` is there once for each."""
        new, n, q = q.shape[2], k.shape[2], q[:, : self.slot.heads]
        at = torch.arange(n, device=q.device)
        q = placed(q, at[n - new :], self.slot)
        self.last, self.dense_pairs = [], dense(new, n, self.slot.causal).dense_pairs
        (k0, *keys), (v0, *values) = k.chunk(BRANCHES, 1), v.chunk(BRANCHES, 1)
        keys = [placed(x, at, self.slot) for x in keys]
        small, ended = self._compressed(k0, 0), self._ended(at[n - new :], n)
        small = placed(small, torch.arange(small.shape[2], device=q.device) * self.stride, self.slot)
        window = torch.full((1,), self.window, device=q.device)
        near = Spans(sinks=window * 0, window=window, queries=new, keys=n, causal=self.slot.causal)
        outs = [self._over_compressed(q, small, self._compressed(v0, 1), ended)]
        for key, value, seen in zip(keys, values, (self._selected(q, small, ended, n), near)):
            self.last.append(seen)
            outs.append(ops.attend(q, key, value, seen)[0])
        return torch.cat(outs, 1)

    def _compressed(self, x: Float[Tensor, "b g n d"], which: int) -> Float[Tensor, "b g m d"]:
        """Of each whole block one key (0) or value (1)."""
        if x.shape[2] < self.block:
            return x[:, :, :0]
        blocks = x.unfold(2, self.block, self.stride).mT + self.where[which]
        return self.phi[which](blocks.flatten(-2))

    def _ended(self, at: Int[Tensor, " q"], n: int) -> Int[Tensor, " q"]:
        """How many compressed blocks each query sees: those that end before it, itself included."""
        there = max(0, (n - self.block) // self.stride + 1)
        if not self.slot.causal:
            return torch.full_like(at, there)
        return ((at + 1 - self.block) // self.stride + 1).clamp(0, there)

    def _over_compressed(self, q: Tensor, k: Tensor, v: Tensor, ended: Int[Tensor, " q"]) -> Tensor:
        if not k.shape[2]:
            return torch.zeros_like(q)
        ranges = torch.stack([torch.zeros_like(ended), ended], -1).int()[None, None, :, None]
        none = torch.full((1, 1, len(ended), 0), -1, dtype=torch.int32, device=q.device)
        seen = Gather(index=none, ranges=ranges, queries=len(ended), keys=k.shape[2], causal=False)
        self.last.append(seen)
        return ops.attend(q, k, v, seen)[0]

    @torch.no_grad()
    def _selected(self, q: Tensor, small: Tensor, ended: Int[Tensor, " q"], n: int) -> Gather:
        """The blocks of largest share, and those that are always there."""
        new, size, at = q.shape[2], self.select_tokens, torch.arange(n, device=q.device)
        block = torch.arange(-(-n // size), device=q.device)
        own = at[n - new :, None] // size
        worth = self._shares(q, small, ended) @ self._overlap(small.shape[2], block).to(q)
        worth = worth.masked_fill((block == 0) | (block == own) | (block == own - 1), torch.inf)
        if self.slot.causal:
            worth = worth.masked_fill(block > own, -torch.inf)
        best = worth.sort(dim=-1, descending=True, stable=True).indices[..., : self.select_blocks]
        best = torch.where(worth.gather(-1, best) > -torch.inf, best, len(block))
        tokens = (best[..., None] * size + torch.arange(size, device=q.device)).flatten(-2)
        index = torch.where(tokens < n, tokens, -1).int().repeat_interleave(group := q.shape[1] // self.kv_heads, 1)
        return Gather(index=index, queries=new, keys=n, causal=self.slot.causal, shared=group)

    def _shares(self, q: Tensor, small: Tensor, ended: Int[Tensor, " q"]) -> Float[Tensor, "b g q m"]:
        """Attention to compressed keys, summed over the query heads of a key/value head; 0 where none has ended."""
        logits = q.unflatten(1, (self.kv_heads, -1)) @ small[:, :, None].mT / math.sqrt(self.head_size)
        hidden = torch.arange(small.shape[2], device=q.device) >= ended[:, None]
        return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0).sum(2)

    def _overlap(self, many: int, block: Int[Tensor, " nb"]) -> Int[Tensor, "m nb"]:
        """Tokens that each compressed block has in common with each block."""
        first, start = torch.arange(many, device=block.device)[:, None] * self.stride, block * self.select_tokens
        ends = torch.minimum(first + self.block, start + self.select_tokens)
        return (ends - torch.maximum(first, start)).clamp(min=0)
