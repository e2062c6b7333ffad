"""Landmark Attention: a token at the end of every block is the gate to it, and says which blocks are worth loading."""

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
from saccade.core.selection import Buckets, Gather, dense
from saccade.methods.mixers._pieces import fresh, in_pieces
from saccade.methods.mixers._places import placed, placed_apart

CHOSEN_AT_ONCE = 2048  # queries


class Landmark(Mixer):
    """Grouped softmax: the own block competes with the landmarks of earlier ones, each of which hands on to its block.

    Blocks have l tokens, the last of them a landmark (`with_landmarks` puts them into a text). With s_ij = q_i . k_j /
    sqrt(d), own keys j <= i of block B, and L_b the logit of the landmark of an earlier block b,
    o_i = (sum_own e^{s_ij} v_j + sum_b e^{L_b} softmax_{j in b}(s_ij) v_j) / (sum_own e^{s_ij} + sum_b e^{L_b}).
    A landmark's own value goes nowhere. Trained so, a layer reads in texts of any length only the read_blocks blocks of
    largest L_b of each token and head, placed as if they were no farther away than read_blocks + 1 blocks.

    block_tokens: l, the landmark included
    read_blocks: k, blocks that a token loads beside its own; 0: all, where they are, as in training

    Raises:
        BadOption: blocks of less than two tokens, or read_blocks where tokens see later ones or are cells.
    Source: arXiv 2305.16300, sections 3 and 4.2; epfml/landmark-attention, lm_benchmark/models.
    """

    card = Card(
        name="landmark",
        title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
        family="mixers",
        paper="arXiv:2305.16300",
        year=2023,
        authors="Mohtashami, Jaggi",
        official="epfml/landmark-attention",
        licence_of_official="Apache-2.0",
        summary="A landmark token closes every block; attention to it is the block's gate, and finds it in long texts.",
        equation="w_ij = p(landmark of j's block) softmax_{block}(s_ij), p over landmarks and the own block",
        budget="none is taken: the pairs follow from the blocks that are read",
        takes_budget=False,
        departures=(
            "Landmarks are where the place in the text says, every l-th token; the authors look for the token itself.",
            "Every token loads its own blocks; the authors may let the heads or a chunk of tokens agree on them.",
            "With fewer than k blocks before a token all of them are loaded, where they are.",
            "Where tokens see later ones, all other closed blocks are gated as earlier ones are; the paper is causal.",
            "A layer of our nets, trained from the beginning. A pretrained model learns landmarks by changes of low"
            " rank (benchmarks/finetune_landmark.py); the authors tune all weights.",
        ),
    )

    def __init__(self, slot: Slot, *, block_tokens: int = 16, read_blocks: int = 0):
        super().__init__(slot)
        self.block, self.read, self.head_size = block_tokens, read_blocks, slot.channels // slot.heads
        if block_tokens < 2:
            found = "a block has a token and its landmark"
            raise BadOption(f"landmark.block_tokens={block_tokens}", found, "Give at least 2.")
        if read_blocks and (slot.grid or not slot.causal):
            found = "only texts in which no token sees a later one are read in part"
            raise BadOption(f"landmark.read_blocks={read_blocks}", found, "Leave it away.")
        self.qkv = torch.nn.Linear(slot.channels, 3 * slot.channels, bias=False)
        self.out = torch.nn.Linear(slot.channels, slot.channels, bias=False)
        self.shape = (0, 0)  # queries and keys of the newest forward

    def forward(self, x, state=None, lengths=None):
        state = state or fresh(x, self.slot.heads)
        out, state = in_pieces(*self._heads(x), state, lengths, self._attend)
        return self.out(rearrange(out, "b h n d -> b n (h d)")), state

    def density(self):
        """Landmarks are among the pairs."""
        queries, keys = self.shape
        if not keys:
            return None
        at, size = torch.arange(keys - queries, keys), self.block
        own = (at % size + 1).clamp(max=size - 1)
        there = at // size
        if not self.slot.causal:
            last = keys - keys // size * size
            own = torch.where(there < keys // size, size - 1, last)
            there = keys // size - (there < keys // size).long()
        loaded = there.clamp(max=self.read) if self.read else there
        return float((own + there + loaded * (size - 1)).sum()) / dense(queries, keys, self.slot.causal).dense_pairs

    def reference(self, x):
        """Query by query: one softmax over own keys and landmarks, one in every block."""
        q, k, v = self._heads(x)
        out = torch.zeros_like(q)
        for b, h, i in itertools.product(range(len(x)), range(self.slot.heads), range(x.shape[1])):
            out[b, h, i] = self._row(q[b, h, i], k[b, h], v[b, h], i)
        return self.out(rearrange(out, "b h n d -> b n (h d)"))

    def _row(self, q: Float[Tensor, " d"], k: Float[Tensor, "n d"], v: Float[Tensor, "n d"], i: int) -> Tensor:
        size, causal = self.block, self.slot.causal
        closed = range(i // size) if causal else [b for b in range(len(k) // size) if b != i // size]
        own = [j for j in range(len(k)) if j // size == i // size and j % size < size - 1 and (j <= i or not causal)]
        moved = self._loaded(q, k, i) if self.read else dict.fromkeys(closed, 0)
        logits = [self._logits(q, k[own], i, own)]
        inner = []
        for b, shift in moved.items():
            inside = list(range(b * size, b * size + size))
            both = self._logits(q, k[inside], i + shift, inside)
            inner.append(both[:-1].softmax(0) @ v[inside[:-1]])
            logits.append(both[-1:])
        weights = torch.cat(logits).softmax(0)
        return weights @ torch.cat([v[own], *(o[None] for o in inner)])

    def _logits(self, q: Tensor, k: Float[Tensor, "m d"], i: int, at: list[int]) -> Float[Tensor, " m"]:
        """Of a query at place i with keys at some places."""
        both = torch.cat([q[None], k])[None, None]
        q, k = placed(both, torch.tensor([i, *at]), self.slot)[0, 0].split([1, len(k)])
        return k @ q[0] / math.sqrt(self.head_size)

    def _loaded(self, q: Tensor, k: Tensor, i: int) -> dict[int, int]:
        """Blocks that a query loads, in the order of the text, and by how much farther on the query then stands."""
        size, own, scores = self.block, i // self.block, {}
        for b in range(own):
            last = b * size + size - 1
            farther = (min(own - b, self.read + 1) - (own - b)) * size
            scores[b] = float(self._logits(q, k[last][None], i + farther, [last]).detach())
        best = sorted(sorted(scores, key=lambda b: -scores[b])[: self.read])
        slots = {b: len(best) + 1 - rank - (own - b <= self.read) for rank, b in enumerate(best)}
        return {b: (slot - (own - b)) * size for b, slot in slots.items()}

    # --- attention ------------------------------------------------------------------------------------------------

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values without positions: what is loaded from far away is placed anew."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.slot.heads)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new, n = self.shape = q.shape[2], k.shape[2]
        at = torch.arange(n, device=q.device)
        turned_q, turned_k = placed(q, at[n - new :], self.slot), placed(k, at, self.slot)
        block = (at // self.block).int()
        ordinary = torch.where(at % self.block < self.block - 1, block, -1)
        shape = {"queries": new, "keys": n, "causal": self.slot.causal}
        own = Buckets(q_bucket=block[None, None, n - new :], k_bucket=ordinary[None, None], **shape)
        out, lse = ops.attend(turned_q, turned_k, v, own)
        if self.read:
            return self._with_best(out, lse, self._best(turned_q, turned_k, q, k), q, k, v)
        return self._with_all(out, lse, turned_q, turned_k, v)

    def _with_all(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Block by block: what it says to the queries behind it (or around it), weighted by its landmark."""
        new, n, size = q.shape[2], k.shape[2], self.block
        at = torch.arange(n - new, n, device=q.device) // size
        for b in range(n // size):
            first = max(0, (b + 1) * size - (n - new)) if self.slot.causal else 0
            if first >= new:
                break
            asking, inside, last = q[:, :, first:], slice(b * size, b * size + size - 1), b * size + size - 1
            said, _ = ops.attend(asking, k[:, :, inside], v[:, :, inside], dense(new - first, size - 1, causal=False))
            gate = self._gate(asking, k[:, :, last : last + 1]).masked_fill(at[first:] == b, -torch.inf)
            some = ops.merge_lse([out[:, :, first:], said], [lse[:, :, first:], gate])
            out, lse = (torch.cat([old[:, :, :first], fresh], 2) for old, fresh in zip((out, lse), some))
        return out

    @torch.no_grad()
    def _best(self, turned_q: Tensor, turned_k: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "b h q k"]:
        """Blocks that each query loads, in the order of the text, then -1 where there are fewer."""
        new, n, size = q.shape[2], k.shape[2], self.block
        at, blocks = torch.arange(n - new, n, device=q.device), n // size
        marks = slice(size - 1, blocks * size, size)
        near, far = turned_k[:, :, marks].mT, placed_apart(k[:, :, marks], at.new_full((blocks,), size - 1)).mT
        moved = placed_apart(q, (self.read + 1) * size + at % size)
        out = []
        for rows in torch.arange(new, device=q.device).split(CHOSEN_AT_ONCE):  # not all scores of a long text at once
            behind = at[rows, None] // size - torch.arange(blocks, device=q.device)
            scores = torch.where(behind <= self.read + 1, turned_q[:, :, rows] @ near, moved[:, :, rows] @ far)
            scores = scores.masked_fill(behind < 1, -torch.inf)
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.read]
            best = torch.where(scores.gather(-1, best) > -torch.inf, best, blocks).sort(-1).values
            out.append(torch.where(best < blocks, best, -1))
        return torch.cat(out, 2)

    def _with_best(
        self, out: Tensor, lse: Tensor, best: Int[Tensor, "b h q k"], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Rank by rank, the query placed as far behind the block as its slot says."""
        new, n, size = q.shape[2], k.shape[2], self.block
        at = torch.arange(n - new, n, device=q.device)
        keys = placed_apart(k, torch.arange(n, device=q.device) % size)
        many = (best >= 0).sum(-1)
        outs, gates = [out], [lse]
        for rank, block in enumerate(best.unbind(-1)):
            slot = many + 1 - rank - (at // size - block <= self.read).long()
            asking = placed_apart(q, slot * size + at % size)
            there = (block >= 0)[..., None]
            inside = block[..., None] * size + torch.arange(size, device=q.device)
            index = torch.where(there, inside[..., :-1], -1).int()
            outs.append(ops.attend(asking, keys, v, Gather(index=index, queries=new, keys=n))[0])
            mark = keys.gather(2, inside[..., -1:].clamp(min=0).expand_as(q))
            gates.append(self._gate(asking, mark).masked_fill(~there[..., 0], -torch.inf))
        return ops.merge_lse(outs, gates)[0]

    def _gate(self, q: Float[Tensor, "b h q d"], mark: Float[Tensor, "b h q d"]) -> Float[Tensor, "b h q"]:
        """Logit of each query with its landmark, as precise as a log-sum-exp."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return (q.to(wide) * mark.to(wide)).sum(-1) / math.sqrt(self.head_size)


def with_landmarks(tokens: Int[Tensor, "b n"], landmark: int, block_tokens: int) -> Int[Tensor, "b m"]:
    """A text with a landmark after every block_tokens - 1 of its tokens."""
    n, inner = tokens.shape[1], block_tokens - 1
    whole = tokens[:, : n // inner * inner].unflatten(1, (-1, inner))
    marked = torch.nn.functional.pad(whole, (0, 1), value=landmark).flatten(1)
    return torch.cat([marked, tokens[:, n // inner * inner :]], 1)


def is_landmark(tokens: int, block_tokens: int) -> Bool[Tensor, " n"]:
    """Which places of a text of so many tokens have landmarks: nothing is to be predicted there."""
    return torch.arange(tokens) % block_tokens == block_tokens - 1
