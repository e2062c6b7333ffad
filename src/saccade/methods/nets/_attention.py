"""Softmax attention over what a method selects: how the methods of `attach` are trained from scratch."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.errors import CannotRun
from saccade.core.method import Method, Mixer, Slot, Sparse
from saccade.core.selection import Selection, dense
from saccade.core.site import Site
from saccade.methods.mixers._pieces import fresh, in_pieces

THETA = 10_000.0  # base of the rotary embedding


class Attention(Mixer):
    """Multi-head attention with rotary positions over the pairs of a method's selection; `full` has all of them.

    o_i = sum_{j in S(i)} softmax_j(q_i . k_j / sqrt(d)) v_j,  S chosen by the method from q and k, without gradient.
    What is chosen while a text is read is chosen as well when one token follows; methods that choose otherwise in
    decoding do that, and search anew at every step.
    Where tokens may see later ones (pictures), the second half of the heads reads the tokens in reverse: methods
    select among earlier keys, so that half the heads looks back and half ahead. `full` sees all pairs instead.

    Raises:
        CannotRun: the method selects nothing while a text is read, needs a pretrained model, or says why not itself.
    """

    def __init__(self, slot: Slot, method: Method):
        super().__init__(slot)
        self.method, self.card, self.head_size = method, method.card, slot.channels // slot.heads
        self.last: Selection | None = None  # of the newest forward, for `density`
        reasons = self._reasons()
        if reasons:
            raise CannotRun(f"train {self.card.name!r} in a net", reasons, "See those that can: saccade train --help")
        self.qkv = torch.nn.Linear(slot.channels, 3 * slot.channels, bias=False)
        self.out = torch.nn.Linear(slot.channels, slot.channels, bias=False)

    def _reasons(self) -> list[str]:
        parts, several = self.method.parts, 4 if self.slot.grid else 2
        found = self.method.check(self._site("prefill", 64, 64))
        if parts and "prefill" not in parts:
            found.append("it selects nothing while a text is read, only what is remembered or read afterwards")
        if self.card.calibrated and self.method.artefact is None:
            found.append("it is calibrated on a pretrained model, and there is none")
        if self.head_size % several:
            found.append(f"heads of {self.head_size} channels cannot be turned in pairs; give a multiple of {several}")
        if not self.slot.causal and parts and self.slot.heads % 2:
            found.append(f"{self.slot.heads} heads have no half that could read in reverse; give an even number")
        return found

    def forward(self, x, state=None, lengths=None):
        state = state or fresh(x, self.slot.heads)
        q, k, v = self._heads(x, state["count"])
        out, state = in_pieces(q, k, v, state, lengths, self._attend)
        return self.out(rearrange(out, "b h n d -> b n (h d)")), state

    def density(self):
        return None if self.last is None else float(self.last.density().mean())

    def reference(self, x):
        """Query by query: softmax over the keys that the mask of the selection shows it."""
        q, k, v = self._heads(x, x.new_zeros(len(x), dtype=torch.long))
        mask = self.selection(x).mask().expand(len(x), self.slot.heads, -1, -1)
        q, k, v = (self._reversed(t) for t in (q, k, v))
        out = torch.zeros_like(q)
        for b, h, i in torch.cartesian_prod(*[torch.arange(size) for size in q.shape[:3]]).tolist():
            seen = mask[b, h, i]
            weights = (k[b, h, seen] @ q[b, h, i] / math.sqrt(self.head_size)).softmax(0)
            out[b, h, i] = weights @ v[b, h, seen]
        return self.out(rearrange(self._reversed(out), "b h n d -> b n (h d)"))

    def selection(self, x: Float[Tensor, "b n c"]) -> Selection:
        """The pairs chosen for these tokens; where half of the heads reads in reverse, as they read."""
        self.forward(x)
        assert self.last is not None, "a forward attends"
        return self.last

    def _heads(self, x: Tensor, before: Int[Tensor, " b"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; the first two turned by their positions."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.slot.heads)
        at = before[:, None] + torch.arange(x.shape[1], device=x.device)
        axes = [at] if self.slot.grid is None else [at // self.slot.grid[1], at % self.slot.grid[1]]
        return turned(q, axes), turned(k, axes), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = q.shape[2] == 1 and k.shape[2] > 1
        site = self._site("decode" if one and "decode" in self.method.parts else "prefill", q.shape[2], k.shape[2])
        if not self.method.parts:
            return self._compute(q, k, v, dense(site.queries, site.keys, self.slot.causal))
        q, k, v = (self._reversed(t) for t in (q, k, v))
        if isinstance(self.method, Sparse):
            return self._reversed(self.method.attend(q, k, v, site))
        with torch.no_grad():
            selection = self.method.select(q, k, site)
        return self._reversed(self._compute(q, k, v, selection or dense(site.queries, site.keys)))

    def _reversed(self, t: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """The second half of the heads in reverse, where tokens may see later ones and the method knows none."""
        if self.slot.causal or not self.method.parts:
            return t
        half = self.slot.heads // 2
        return torch.cat([t[:, :half], t[:, half:].flip(2)], 1)

    def _compute(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
        return self._partial(q, k, v, selection)[0]

    def _partial(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        self.last = selection
        return ops.attend(q, k, v, selection)

    def _site(self, stage, queries: int, keys: int) -> Site:
        slot = self.slot
        return Site(
            layer=slot.layer,
            layers=slot.layers,
            heads=slot.heads,
            kv_heads=slot.heads,
            head_size=self.head_size,
            stage=stage,
            queries=queries,
            keys=keys,
            seen=keys,
            scale=self.head_size**-0.5,
            budget=slot.budget,
            seed=slot.seed,
            attend=self._compute,
            partial=self._partial,
        )


def turned(x: Float[Tensor, "b h n d"], axes: list[Int[Tensor, "b n"]]) -> Float[Tensor, "b h n d"]:
    """Rotary embedding: pairs of channels turned by their position; with two axes, half of the channels by each.

    (x1, x2) -> (x1 cos a - x2 sin a, x1 sin a + x2 cos a),  a = position theta^(-2i/d). Source: arXiv 2104.09864.
    """
    out = []
    for part, at in zip(x.chunk(len(axes), -1), axes):
        half = part.shape[-1] // 2
        speed = THETA ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
        angle = at[:, None, :, None] * speed
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = part.chunk(2, -1)
        out += [first * cos - second * sin, first * sin + second * cos]
    return torch.cat(out, -1)
