"""BiFormer: regions of a picture first choose regions, then their tokens attend to the tokens of those."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Mixer, Slot
from saccade.core.selection import Gather
from saccade.methods.mixers._halo import Halo
from saccade.methods.mixers._pieces import check_cells, fresh, in_pieces, refuse_causal_pictures


class BiFormer(Mixer):
    """Bi-level routing attention: each region attends to the `topk` regions whose mean key its mean query likes best.

    A = mean(q over a region) . mean(k over a region),  I = the topk largest of each row, for all heads together and
    without gradient;  o_i = sum_{j in the regions I} softmax_j(q_i . k_j / sqrt(C)) v_j + lepe(v)_i,
    lepe a depthwise convolution over the values. Nothing is gathered: the regions are a selection.
    In a causal text a token may not ask for its region: each routes by its own query among the regions that are over,
    and always sees its own up to itself. The nets of the paper are `saccade.methods.nets.BiFormers`.

    side: cells of a region along each axis; the paper cuts every picture into 7 x 7 regions
    topk: regions that are attended to, in a causal text with its own
    qk_scale: divide by the square root of all "channels", as the published weights need it, or of those of a "head"
    lepe: width of the convolution over the values, odd; 0: none

    Raises:
        BadOption: sizes that make no regions. BadInput: tokens that are not the cells of the grid.
        CannotRun: a picture in which no token may see a later one.

    Source: arXiv 2303.08810, section 3; rayleizhu/BiFormer, ops/bra_legacy.py (scale, routing, lepe).
    """

    card = Card(
        name="biformer",
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        family="mixers",
        paper="arXiv:2303.08810",
        year=2023,
        authors="Zhu, Wang, Ke, Zhang, Lau",
        official="rayleizhu/BiFormer",
        licence_of_official="MIT",
        summary="Regions choose regions by pooled queries and keys; tokens attend to the tokens of the chosen ones.",
        equation="I = topk(mean(q) mean(k)^T) of regions; o_i = softmax(q_i K_I^T / sqrt(C)) V_I + lepe(V)_i",
        takes_budget=False,
        departures=(
            "The chosen regions are lists of keys for `ops.attend`; the official code copies them k times.",
            "Regions at the border may be cut: cells that are not there are in no mean and are seen by nobody; the"
            " official code pads, and sees the padding.",
            "A causal text is ours: routing by each token's own query among regions that are over. The paper has"
            " pictures only, where a region asks with all of its queries.",
            "Weighting what was chosen by its routing score, which the official code can and does not by default, is"
            " left out.",
        ),
    )

    def __init__(
        self,
        slot: Slot,
        *,
        side: int = 2,
        topk: int = 4,
        qk_scale: Literal["channels", "head"] = "channels",
        lepe: int = 5,
    ):
        super().__init__(slot)
        refuse_causal_pictures("biformer", slot)
        if min(side, topk) < 1:
            raise BadOption(f"biformer of side={side}, topk={topk}", "both must be 1 or more", "Give such numbers.")
        if lepe < 0 or lepe % 2 == 0 < lepe:
            raise BadOption(f"biformer.lepe={lepe}", "a convolution has an odd width", "Give 0 for none.")
        self.side, self.topk, c = side, topk, slot.channels
        self.scale = (c if qk_scale == "channels" else c // slot.heads) ** -0.5
        self.qkv, self.out = torch.nn.Linear(c, 3 * c), torch.nn.Linear(c, c)
        wide = (lepe if slot.grid else 1, lepe)
        self.lepe = torch.nn.Conv2d(c, c, wide, groups=c) if lepe else None

    def forward(self, x, state=None, lengths=None):
        check_cells("biformer", self.slot, x.shape[1])
        state = state or fresh(x, self.slot.heads)
        out, state = in_pieces(*self._heads(x), state, lengths, self._attend)
        return self.out(rearrange(out, "b h n d -> b n (h d)")), state

    def reference(self, x):
        """Region by region and query by query: means, the best of them, softmax over their tokens, taps of lepe."""
        q, k, v = self._heads(x)
        regions, out = self._regions(x.shape[1]), torch.zeros_like(v)
        cells = [[j for j in region if j >= 0] for region in regions.tolist()]
        for b in range(len(x)):
            flat_q, flat_k = (rearrange(t[b].detach(), "h n d -> n (h d)") for t in (q, k))
            means = torch.stack([flat_k[mine].mean(0) for mine in cells])
            for r, mine in enumerate(cells):
                for i in mine:
                    asks = flat_q[i] if self.slot.causal else flat_q[mine].mean(0)
                    liked = (means @ asks).argsort(descending=True).tolist()
                    if self.slot.causal:
                        liked = [r, *[other for other in liked if other < r]]
                    seen = [j for other in liked[: self.topk] for j in cells[other] if not self.slot.causal or j <= i]
                    weights = (k[b][:, seen] @ q[b][:, i, :, None] * self.scale).softmax(1)
                    out[b, :, i] = (weights * v[b][:, seen]).sum(1)
        return self.out(rearrange(out, "b h n d -> b n (h d)") + self._taps(rearrange(v, "b h n d -> b n (h d)")))

    def _taps(self, v: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """lepe, tap by tap."""
        if self.lepe is None:
            return torch.zeros_like(v)
        sides = self.slot.grid or (1, v.shape[1])
        wide, out = torch.nn.functional.pad(v.unflatten(1, sides), (0, 0, *self._around())), self.lepe.bias
        for dy in range(self.lepe.kernel_size[0]):
            for dx in range(self.lepe.kernel_size[1]):
                out = out + wide[:, dy : dy + sides[0], dx : dx + sides[1]] * self.lepe.weight[:, 0, dy, dx]
        return out.flatten(1, 2)

    def _around(self) -> tuple[int, int, int, int]:
        """Zeros left, right, above and below of what lepe reads; a causal text has none behind it."""
        assert self.lepe is not None, "asked where there is one"
        up, left = (n // 2 for n in self.lepe.kernel_size)
        return (2 * left, 0, 0, 0) if self.slot.causal else (left, left, up, up)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()  # with a bias, the product of strided rows rounds otherwise
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.slot.heads)
        return q, k, v

    def _regions(self, tokens: int) -> Int[Tensor, "regions w"]:
        """Cells of each region, -1 where one is cut."""
        return Halo(self.slot.grid or (tokens,), self.side, 0).queries()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        regions = self._regions(k.shape[2]).to(q.device)
        with torch.no_grad():
            asks, keys = (rearrange(t, "b h n d -> b n (h d)") for t in (q, k))
            index = self._from_tokens(asks, keys, regions) if self.slot.causal else self._routed(asks, keys, regions)
        out = self._alone(q, k, v, index) if self.slot.causal else self._together(q, k, v, index, regions)
        return out if self.lepe is None else out + self._local(v)[:, :, -q.shape[2] :]

    def _routed(self, q: Tensor, k: Tensor, regions: Tensor) -> Int[Tensor, "b regions l"]:
        """Keys of each region: the cells of those it likes best."""
        real = regions >= 0
        liked = mean(q, regions, real) @ mean(k, regions, real).mT
        return regions[liked.topk(min(self.topk, len(regions)), -1).indices].flatten(2)

    def _from_tokens(self, q: Tensor, k: Tensor, regions: Tensor) -> Int[Tensor, "b q l"]:
        """Keys of each token: those of its own region and of the ones before that its query likes best."""
        own = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device) // self.side
        liked = q @ mean(k, regions, regions >= 0).mT
        over = torch.arange(len(regions), device=q.device) < own[:, None]
        best = liked.masked_fill(~over, -torch.inf).topk(min(self.topk - 1, len(regions)), -1)
        others = torch.where((best.values > -torch.inf)[..., None], regions[best.indices], -1).flatten(2)
        return torch.cat([regions[own].expand(len(q), -1, -1), others], -1)

    def _together(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, regions: Tensor) -> Tensor:
        """Attention of regions, their queries side by side."""
        order, keys = regions.flatten(), k.shape[2]
        shape = {"q_block": self.side ** (2 if self.slot.grid else 1), "queries": len(order), "keys": keys}
        selection = Gather(index=index[:, None].int(), causal=False, **shape)
        out, _ = ops.attend(q[:, :, order.clamp(min=0)], k, v, selection, scale=self.scale)
        real = (order >= 0).nonzero()[:, 0]
        return out[:, :, real[order[real].argsort()]]

    def _alone(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        selection = Gather(index=index[:, None].int(), queries=q.shape[2], keys=k.shape[2])
        return ops.attend(q, k, v, selection, scale=self.scale)[0]

    def _local(self, v: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """lepe(v)."""
        assert self.lepe is not None, "asked where there is one"
        image = rearrange(v, "b h n d -> b (h d) n").unflatten(2, self.slot.grid or (1, v.shape[2]))
        out = self.lepe(torch.nn.functional.pad(image, self._around()))
        return rearrange(out.flatten(2), "b (h d) n -> b h n d", h=v.shape[1])


def mean(
    x: Float[Tensor, "b n c"], regions: Int[Tensor, "regions w"], real: Bool[Tensor, "regions w"]
) -> Float[Tensor, "b regions c"]:
    """Over the cells of each region that are there."""
    cells = x[:, regions.clamp(min=0)] * real[..., None]
    return cells.sum(2) / real.sum(1)[:, None]
