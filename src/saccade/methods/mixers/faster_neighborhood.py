"""Neighborhood attention: every cell sees as many of its nearest cells; fused, or as products that store weights."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadInput, CannotRun
from saccade.core.method import Mixer, Slot
from saccade.core.selection import Gather
from saccade.methods.mixers._pieces import fresh, in_pieces, refuse_causal_pictures
from saccade.methods.mixers._windows import Axis, Windows
from saccade.methods.nets._attention import turned

Form = Literal["fused", "unfused", "naive"]


class FasterNeighborhood(Mixer):
    """Attention of every cell over the `kernel` nearest cells along each axis, moved inwards at the border.

    o_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(d)) v_j,  N(i) = start(i) .. start(i) + k - 1 along each axis,
    start(i) = min(max(l - k // 2, 0), n - k),  l = i, or the middle one of the `stride` queries that share a window.
    So every query has k^axes keys, at the border too. With a dilation the rule holds among the cells of one remainder.
    In a net that is causal: the k cells that end with the query. Queries and keys are turned by their position.

    kernel: cells that a query sees along each axis
    dilation: every so-manieth cell
    stride: queries in a row that share a window; as many as the kernel: blocks
    form: how whole inputs are computed: "fused" by `ops.attend`, "unfused" as products of tiles with weights that are
        stored, "naive" with the keys of every query copied. What follows on a state is fused

    Raises:
        BadOption: a window that does not fit the picture. BadInput: tokens that are not the cells of the grid.
        CannotRun: a picture in which no token may see a later one, or heads that cannot be turned.

    Source: arXiv 2403.04690, sections 3 and 4; strides: arXiv 2504.16922; SHI-Labs/NATTEN, mask.hpp (window rules).
    """

    card = Card(
        name="faster-neighborhood",
        title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        family="mixers",
        paper="arXiv:2403.04690",
        year=2024,
        authors="Hassani, Hwu, Shi",
        official="SHI-Labs/NATTEN",
        licence_of_official="MIT",
        summary="Every cell sees as many of its nearest cells, moved inwards at the border; fused or as products.",
        equation="along each axis query i sees the k keys from min(max(i - k // 2, 0), n - k) on",
        takes_budget=False,
        departures=(
            "No kernel is written for it: fused is `ops.attend` over the windows as a selection (on a GPU the kernel"
            " for grids; with a stride, lists of keys), unfused is PyTorch's products.",
            "The unfused form has no relative position bias, which the authors dropped later; queries and keys are"
            " turned by rotary positions instead.",
            "A stride, and what is causal or dilated along each axis apart, go through lists of keys for each group of"
            " queries, not through the kernel for grids.",
            "A causal window may be longer than the text, so that a text can grow; NATTEN refuses that.",
            "In a causal text with a stride, queries of the last group see what they would if the group were whole, so"
            " that pieces agree with one pass; NATTEN moves its window to the last query.",
        ),
    )

    def __init__(self, slot: Slot, *, kernel: int = 7, dilation: int = 1, stride: int = 1, form: Form = "fused"):
        super().__init__(slot)
        refuse_causal_pictures("faster-neighborhood", slot)
        several, size = 4 if slot.grid else 2, slot.channels // slot.heads
        if size % several:
            found = f"heads of {size} channels cannot be turned in pairs; give a multiple of {several}"
            raise CannotRun("train 'faster-neighborhood' in a net", found, "Give other channels or heads.")
        self.kernel, self.dilation, self.stride, self.form = kernel, dilation, stride, form
        if slot.grid:
            self._windows(slot.grid[0] * slot.grid[1])  # what does not fit is said before training
        self.qkv = torch.nn.Linear(slot.channels, 3 * slot.channels, bias=False)
        self.out = torch.nn.Linear(slot.channels, slot.channels, bias=False)

    def forward(self, x, state=None, lengths=None):
        state = state or fresh(x, self.slot.heads)
        q, k, v = self._heads(x, state["count"])
        out, state = in_pieces(q, k, v, state, lengths, self._attend)
        return self.out(rearrange(out, "b h n d -> b n (h d)")), state

    def reference(self, x):
        """Query by query, over the keys of its window."""
        q, k, v = self._heads(x, x.new_zeros(len(x), dtype=torch.long))
        keys, out = self._windows(x.shape[1]).keys(), []
        for i in range(x.shape[1]):
            seen = keys[i][keys[i] >= 0]
            weights = (k[:, :, seen] @ q[:, :, i, :, None] * q.shape[-1] ** -0.5).softmax(2)
            out.append((weights * v[:, :, seen]).sum(2))
        return self.out(rearrange(torch.stack(out, 2), "b h n d -> b n (h d)"))

    def _heads(self, x: Tensor, before: Int[Tensor, " b"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; the first two turned by their positions."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.slot.heads)
        at = before[:, None] + torch.arange(x.shape[1], device=x.device)
        axes = [at] if self.slot.grid is None else [at // self.slot.grid[1], at % self.slot.grid[1]]
        return turned(q, axes), turned(k, axes), v

    def _windows(self, tokens: int) -> Windows:
        """For so many tokens, or some more: whole groups of queries in a causal text."""
        causal, sides = self.slot.causal, self.slot.grid or (tokens,)
        if causal:
            sides = (-(-tokens // (self.stride * self.dilation)) * self.stride * self.dilation,)
        if causal and self.stride == 1:
            sides = (tokens,)
        return Windows(tuple(Axis(n, self.kernel, self.dilation, self.stride, causal) for n in sides))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        windows, (queries, keys) = self._windows(k.shape[2]), (q.shape[2], k.shape[2])
        if queries == keys == windows.cells or not self.slot.causal:
            return neighborhood_attention(q, k, v, windows, self.form)[0]
        index = windows.keys()[keys - queries : keys].int()[None, None].to(q.device)
        return ops.attend(q, k, v, Gather(index=index, queries=queries, keys=keys))[0]


def neighborhood_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    windows: Windows,
    form: Form = "fused",
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Attention over a neighbourhood, and the log-sum-exp of each row; the cells of the grid in order of rows.

    form: "fused" (no weight is stored, by `ops.attend`), "unfused" (tiles of queries times the box of keys that they
        see, weights [n k] stored), "naive" (the keys of every query copied)

    Raises:
        BadInput: another number of tokens than of cells.
    """
    if q.shape[2] != windows.cells or k.shape[2] != windows.cells:
        asked = f"a neighbourhood for {q.shape[2]} queries and {k.shape[2]} keys"
        raise BadInput(asked, f"the grid has {windows.cells} cells", "Give the grid of these tokens.")
    if form == "fused":
        return _fused(q, k, v, windows)
    return (_unfused if form == "unfused" else _naive)(q, k, v, windows)


def _fused(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    selection, order = windows.selection(q.device)
    if order is None:
        return ops.attend(q, k, v, selection)
    out, lse = ops.attend(q[:, :, order.clamp(min=0)], k, v, selection)
    back = _back(order)
    return out[:, :, back], lse[:, :, back]


def _back(order: Int[Tensor, " m"]) -> Int[Tensor, " n"]:
    """Where each query is in an order that has gaps, -1."""
    real = (order >= 0).nonzero()[:, 0]
    return real[order[real].argsort()]


def _naive(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    index = windows.keys().to(q.device)
    logits = torch.einsum("bhnd,bhnkd->bhnk", q, k[:, :, index.clamp(min=0)]) * q.shape[-1] ** -0.5
    logits = logits.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(index < 0, -torch.inf)
    out = torch.einsum("bhnk,bhnkd->bhnd", logits.softmax(-1).to(v.dtype), v[:, :, index.clamp(min=0)])
    return out, logits.logsumexp(-1)


def _unfused(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    queries, keys, where = (x.to(q.device) for x in windows.tiles())
    box = q[:, :, queries.clamp(min=0)] @ k[:, :, keys].mT * q.shape[-1] ** -0.5
    index = where.clamp(min=0).expand(*q.shape[:2], -1, -1, -1)
    logits = box.gather(-1, index).to(torch.promote_types(q.dtype, torch.float32))  # [b h T t k], stored
    logits = logits.masked_fill(where < 0, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1).masked_fill(where < 0, 0.0).to(v.dtype)
    spread = torch.zeros_like(box).scatter_add(-1, index, weights)
    out, lse = spread @ v[:, :, keys], logits.logsumexp(-1)
    back = _back(queries.flatten())
    return out.flatten(2, 3)[:, :, back], lse.flatten(2, 3)[:, :, back]
