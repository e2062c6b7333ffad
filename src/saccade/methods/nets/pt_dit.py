"""PT-DiT: a diffusion block whose global attention is among proxies, one for each small cell of the picture."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.method import Mixer, Slot
from saccade.core.selection import Buckets, Selection, dense

CHOICES = {"extraction": ("mean", "first"), "proxy_layout": ("cell", "ref")}
MODULATIONS = 6  # shift, scale and gate, of windows and of shifted windows


class PtDit(Mixer):
    """Proxies attend to each other, all tokens to the proxies, then each token to its window and a shifted window.

    a = mean of x over cells;   a <- a + Attn(LN a);   x <- x + Z_1 Attn(q = LN x, kv = LN a);
    x <- x + g_1 Attn_window(m_1(x));   x <- x + Z_2 (g_2 Attn_shifted(m_2(x))),   m(x) = LN(x) (1 + s) + b.
    It gives what is added to x; the layers of a block that work on single tokens are the net's. Z start at 0.

    window_side: c, rows and columns of a window; the shift is half of it
    proxy_side: p, rows and columns of a cell, which divides c
    extraction: a cell's proxy is its mean, or its first token
    proxy_layout: a cell is contiguous, or, of "ref", the tokens of a window that lie c / p apart, as the authors' code
        has it
    shifted: whether there is the second window

    Raises:
        BadOption: sides that do not divide one another, or a value that no option has.
        CannotRun: tokens that are no picture's, or see none behind them, windows that do not tile it, rows in pieces.
        BadInput: modulations of another shape.
    Source: arXiv 2409.04005, section 3; Ascend/MindSpeed-MM, pt_dit_diffusers.py (the authors' code is not out).
    """

    card = Card(
        name="pt-dit",
        title="Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task",
        family="nets",
        paper="arXiv:2409.04005",
        year=2024,
        authors="Wang, Ma, Feng, Leng, Yin, Liang",
        official="360CVGroup/Qihoo-T2X",
        summary="Global attention among one proxy a cell, spread by cross-attention; details by shifted windows.",
        equation="x + Z1 Attn(x, proxies) + g1 Attn_window(x) + Z2 g2 Attn_shifted(x)",
        budget="none: what is computed follows from the sides of windows and cells",
        takes_budget=False,
        departures=(
            "Cells are contiguous, as the paper's text has them; the code behind proxy_layout='ref' splits each axis"
            " the other way around and averages tokens that lie apart.",
            "One modulation for each picture and not, as in that code, one for another's windows where a batch holds"
            " several times.",
            "A shifted window never holds tokens of two sides of the picture; the code computes them under a mask, the"
            " same.",
            "Pictures only, no frames. Random proxies, text, and sizes that windows do not tile are left out.",
        ),
    )

    def __init__(
        self,
        slot: Slot,
        *,
        window_side: int = 4,
        proxy_side: int = 2,
        extraction: Literal["mean", "first"] = "mean",
        proxy_layout: Literal["cell", "ref"] = "cell",
        shifted: bool = True,
    ):
        super().__init__(slot)
        for name, value in (("extraction", extraction), ("proxy_layout", proxy_layout)):
            if value not in CHOICES[name]:
                found = f"it takes {' or '.join(map(repr, CHOICES[name]))}"
                raise BadOption(f"pt-dit.{name}={value!r}", found, "Give one of these.")
        if min(window_side, proxy_side) < 1 or window_side % proxy_side:
            asked = f"pt-dit.window_side={window_side} with proxy_side={proxy_side}"
            raise BadOption(asked, "cells tile a window only if the second divides the first", "Change one.")
        self.window, self.cell, self.extraction, self.layout = window_side, proxy_side, extraction, proxy_layout
        reasons = self._reasons()
        if reasons:
            raise CannotRun("make a layer of pt-dit", reasons, "Give it a picture whose sides the window divides.")
        c, kinds = slot.channels, ("proxies", "cross", "windows") + ("shifted",) * shifted
        self.attention = nn.ModuleDict({kind: Heads(c, slot.heads) for kind in kinds})
        self.spread = _zero(nn.Linear(c, c))
        self.detail = _zero(nn.Linear(c, c)) if shifted else None

    def _reasons(self) -> list[str]:
        if self.slot.grid is None:
            return ["the tokens are no picture's"]
        sides = [f"{side} rows or columns have no whole windows of {self.window}" for side in self.slot.grid
                 if side % self.window]  # fmt: skip
        return sides + ["no token would see a later one"] * self.slot.causal

    def forward(self, x, state=None, lengths=None, modulation=None):
        if state or lengths is not None or x.shape[1] != self.slot.grid[0] * self.slot.grid[1]:
            raise CannotRun("read a picture in pieces", "every token sees all others", "Give whole pictures.")
        first, second = self._modulations(x, modulation)
        new = x + self.spread(self.attention["cross"](norm(x), norm(self._proxies(x))))
        shift, scale, gate = first
        h = norm(new) * (1 + scale) + shift
        new = new + gate * self.attention["windows"](h, h, self.windows(0, x.device))
        if self.detail is not None:
            shift, scale, gate = second
            h = norm(new) * (1 + scale) + shift
            new = new + self.detail(gate * self.attention["shifted"](h, h, self.windows(self.window // 2, x.device)))
        return new - x, {}

    def reference(self, x):
        """Token by token, without modulation: who sees whom by their coordinates."""
        groups = self._cells()
        proxies = [x[:, g[:1]] if self.extraction == "first" else x[:, g].mean(1, keepdim=True) for g in groups]
        a = torch.cat(proxies, 1)
        every = [list(range(a.shape[1]))]
        a = a + self.attention["proxies"].slow(norm(a), norm(a), every * a.shape[1])
        new = x + self.spread(self.attention["cross"].slow(norm(x), norm(a), every * x.shape[1]))
        h = norm(new)
        new = new + self.attention["windows"].slow(h, h, self._seen(0))
        if self.detail is not None:
            h = norm(new)
            new = new + self.detail(self.attention["shifted"].slow(h, h, self._seen(self.window // 2)))
        return new - x

    def windows(self, shift: int, device: torch.device) -> Selection:
        """Tokens of one window see each other. Shifted windows are cut off where the picture ends."""
        rows, columns = (torch.arange(side, device=device) for side in self.slot.grid or ())
        row, column = ((at - shift).div(self.window, rounding_mode="floor") + 1 for at in (rows, columns))
        bucket = (row[:, None] * (int(column.max()) + 1) + column).flatten()[None, None]
        n = bucket.shape[-1]
        return Buckets(q_bucket=bucket, k_bucket=bucket, queries=n, keys=n, causal=False)

    def _proxies(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """One for each cell, after they attended to each other."""
        assert self.slot.grid is not None, "the constructor refuses what is no picture"
        p, r = self.cell, self.window // self.cell
        split = "(w r p) (v s q)" if self.layout == "cell" else "(w p r) (v q s)"
        x = rearrange(x, "b (y x) c -> b y x c", y=self.slot.grid[0])
        x = rearrange(x, f"b {split} c -> b (w r v s) (p q) c", p=p, q=p, r=r, s=r)
        a = x[:, :, 0] if self.extraction == "first" else reduce(x, "b m k c -> b m c", "mean")
        return a + self.attention["proxies"](norm(a), norm(a))

    def _modulations(
        self, x: Tensor, modulation: Float[Tensor, "b 6 c"] | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Shift, scale and gate, of windows and of shifted ones; none given: 0, 0 and 1."""
        if modulation is None:
            plain = x.new_zeros(MODULATIONS, 1, 1, 1)
            plain[2::3] = 1
            return tuple(plain[:3]), tuple(plain[3:])
        if modulation.shape != (len(x), MODULATIONS, x.shape[2]):
            asked = f"modulations of {len(x)} pictures of {x.shape[2]} channels"
            raise BadInput(asked, f"they are {tuple(modulation.shape)}", "Give [pictures, 6, channels].")
        each = tuple(modulation[:, :, None].unbind(1))
        return each[:3], each[3:]

    # --- written out ------------------------------------------------------------------------------------------------

    def _cells(self) -> list[list[int]]:
        """The tokens of each cell, cells and tokens row by row."""
        rows, columns = self.slot.grid or ()
        down, across = ([self._along(i) for i in range(side // self.cell)] for side in (rows, columns))
        return [[y * columns + x for y in some for x in others] for some in down for others in across]

    def _along(self, cell: int) -> list[int]:
        """The rows, or the columns, of a cell."""
        each = self.window // self.cell
        window, which = divmod(cell, each)
        first, step = (which * self.cell, 1) if self.layout == "cell" else (which, each)
        return [window * self.window + first + i * step for i in range(self.cell)]

    def _seen(self, shift: int) -> list[list[int]]:
        """Which tokens each one sees in the rolled picture: same window, neither of them wrapped around alone."""
        rows, columns = self.slot.grid or ()

        def place(at: int, side: int) -> tuple[int, bool]:
            return (at - shift) % side // self.window, at - shift < 0

        labels = [(place(y, rows), place(x, columns)) for y in range(rows) for x in range(columns)]
        return [[j for j, other in enumerate(labels) if other == mine] for mine in labels]


class Heads(nn.Module):
    """Multi-head attention of some tokens to others, each with maps of their own."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels, bias=False) for _ in range(4))

    def forward(self, x: Float[Tensor, "b n c"], y: Float[Tensor, "b m c"], seen: Selection | None = None) -> Tensor:
        q, k, v = self._split(x, y)
        out, _ = ops.attend(q, k, v, seen or dense(q.shape[2], k.shape[2], causal=False))
        return self.out(rearrange(out, "b h n d -> b n (h d)"))

    def slow(self, x: Tensor, y: Tensor, seen: list[list[int]]) -> Tensor:
        """The same, one token after the other."""
        q, k, v = self._split(x, y)
        rows = []
        for i, some in enumerate(seen):
            weights = (torch.einsum("bhd,bhnd->bhn", q[:, :, i], k[:, :, some]) / q.shape[-1] ** 0.5).softmax(-1)
            rows.append(torch.einsum("bhn,bhnd->bhd", weights, v[:, :, some]))
        return self.out(rearrange(torch.stack(rows, 2), "b h n d -> b n (h d)"))

    def _split(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        each = ((self.q, x), (self.k, y), (self.v, y))
        return tuple(rearrange(w(z), "b n (h d) -> b h n d", h=self.heads) for w, z in each)


def norm(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """LN, without gains."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
