"""HaloNet: the queries of a block share one window, the block and a halo around it."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from saccade.core.card import Card
from saccade.core.method import Mixer, Slot
from saccade.methods.mixers._halo import Halo, halo_attention
from saccade.methods.mixers._pieces import check_cells, fresh, in_pieces, refuse_causal_pictures


class HaloNet(Mixer):
    """Attention of blocks of b x b cells over the (b + 2 h) x (b + 2 h) cells around them, with relative positions.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(d) + q_i . r_row[u_j - x_i] + q_i . r_col[v_j - y_i]) v_j,  over the window
    of the block of i. With b = 1 each cell has its own window, with h = 0 blocks do not meet, with b as wide as the
    picture attention is global. In a text: blocks of b tokens along one axis; if it is causal, up to the token itself.
    The nets of the paper, H0 to H7, are `saccade.methods.nets.HaloNets`.

    block: b, cells of a block along each axis
    halo: h, cells around it that it sees too
    mask_pad: nothing beyond the border is seen; False: zeros lie there, and take part in the softmax
    scale_positions: divide the relative terms by sqrt(d) too

    Raises:
        BadOption: sizes that make no blocks. BadInput: tokens that are not the cells of the grid.
        CannotRun: a picture in which no token may see a later one.

    Source: arXiv 2103.12731, section 3; no official code. Compared in words with timm's halo_attn.py.
    """

    card = Card(
        name="halonet",
        title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        family="mixers",
        paper="arXiv:2103.12731",
        year=2021,
        authors="Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens",
        summary="All queries of a block share one window: the block and a halo around it, with relative positions.",
        equation="softmax_j(q_i . (k_j / sqrt(d) + r_row[u_j - x_i] + r_col[v_j - y_i])) v_j, j in the block's window",
        takes_budget=False,
        departures=(
            "The layer ends in a linear map of all heads; in the nets H0 to H7, as in the paper, the next 1 x 1"
            " convolution is that.",
            "Cells beyond the border are not seen; `mask_pad=False` is what timm does, zeros that take part.",
            "Relative terms are not divided by sqrt(d) unless `scale_positions` asks for it; papers of this line and"
            " their re-implementations differ.",
            "With a stride, positions are counted in cells of the map that is read; timm counts queries.",
            "In a text it is the same along one axis; the paper has pictures only.",
        ),
    )

    def __init__(
        self, slot: Slot, *, block: int = 8, halo: int = 3, mask_pad: bool = True, scale_positions: bool = False
    ):
        super().__init__(slot)
        refuse_causal_pictures("halonet", slot)
        self.block, self.halo, self.mask_pad, self.scale_positions = block, halo, mask_pad, scale_positions
        size, reach = slot.channels // slot.heads, 2 * self._halo(1).window - 1
        self.qkv = torch.nn.Linear(slot.channels, 3 * slot.channels, bias=False)
        self.out = torch.nn.Linear(slot.channels, slot.channels, bias=False)
        self.tables = torch.nn.ParameterList(
            torch.randn(reach, size) * size**-0.5 for _ in range(2 if slot.grid else 1)
        )

    def forward(self, x, state=None, lengths=None):
        check_cells("halonet", self.slot, x.shape[1])
        state = state or fresh(x, self.slot.heads)
        out, state = in_pieces(*self._heads(x), state, lengths, self._attend)
        return self.out(rearrange(out, "b h n d -> b n (h d)")), state

    def reference(self, x):
        """Query by query: every cell of the window of its block, one after the other."""
        q, k, v = self._heads(x)
        sides, scale = self.slot.grid or (1, x.shape[1]), q.shape[-1] ** -0.5
        out = []
        for cell in range(x.shape[1]):
            here, logits, values = divmod(cell, sides[1]), [], []
            for at, away in self._window(here, sides):
                inside = all(0 <= a < side for a, side in zip(at, sides))
                if not inside and self.mask_pad:
                    continue
                j = at[0] * sides[1] + at[1]
                if self.slot.causal and j > cell:
                    continue
                said = sum(q[:, :, cell] @ table[far] for table, far in zip(self.tables, away))
                said = said * scale if self.scale_positions else said
                logits.append(said + (q[:, :, cell] * k[:, :, j]).sum(-1) * scale if inside else said)
                values.append(v[:, :, j] if inside else torch.zeros_like(v[:, :, 0]))
            weights = torch.stack(logits, -1).softmax(-1)
            out.append((weights[..., None] * torch.stack(values, -2)).sum(-2))
        return self.out(rearrange(torch.stack(out, 2), "b h n d -> b n (h d)"))

    def _window(self, here: tuple[int, int], sides: tuple[int, int]):
        """Cells of the window, and for each which row of each table is meant."""
        wide, (y, x) = self.block + 2 * self.halo, here
        x0, y0 = x - x % self.block - self.halo, y - y % self.block - self.halo
        rows = range(wide) if self.slot.grid else [self.halo]  # a line has one row
        for u in rows:
            for w in range(wide):
                far = (u - y % self.block + wide - 1, w - x % self.block + wide - 1)
                yield (y0 + u, x0 + w), far if self.slot.grid else far[1:]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.slot.heads)
        return q, k, v

    def _halo(self, tokens: int) -> Halo:
        sides = self.slot.grid or (tokens,)
        return Halo(sides, self.block, self.halo, mask_pad=self.mask_pad, causal=self.slot.causal)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        halo = self._halo(k.shape[2])
        return halo_attention(q, k, v, list(self.tables), halo, scale_positions=self.scale_positions)
