"""The nets of HaloNet, H0 to H7: a ResNet whose bottlenecks attend over a block and its halo instead of convolving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from saccade.core.errors import UnknownName
from saccade.methods.mixers._halo import Halo, halo_attention

WIDTHS, HEADS = (64, 128, 256, 512), (4, 8, 8, 8)  # inside the bottlenecks of each stage


@dataclass(frozen=True)
class Size:
    """One row of the paper's table of the family.

    image: rows and columns of a picture; block, halo: b and h; value: r_v, width of the values over that inside a
    bottleneck; wider: r_b, width of its output over that inside; depths: bottlenecks of each stage, the third is l_3
    last: d_f, width of a last 1 x 1 convolution, 0: none
    """

    image: int
    block: int
    halo: int
    value: float
    wider: float
    depths: tuple[int, int, int, int]
    last: int = 0


SIZES = {
    "h0": Size(256, 8, 3, 1.0, 0.5, (3, 3, 7, 3)),
    "h1": Size(256, 8, 3, 1.0, 1.0, (3, 3, 10, 3)),
    "h2": Size(256, 8, 3, 1.0, 1.25, (3, 3, 11, 3)),
    "h3": Size(320, 10, 3, 1.0, 1.5, (3, 3, 12, 3), 1024),
    "h4": Size(384, 12, 2, 1.0, 3.0, (3, 3, 12, 3), 1280),
    "h5": Size(448, 14, 2, 2.5, 2.0, (3, 3, 23, 3), 1536),
    "h6": Size(512, 8, 4, 3.0, 2.75, (3, 3, 24, 3), 1536),
    "h7": Size(600, 10, 3, 4.0, 3.5, (3, 3, 26, 3), 2048),
}


class HaloMap(nn.Module):
    """Halo attention over a map [b c y x]; with a stride the map that comes out is smaller, and nothing is pooled."""

    def __init__(self, channels: int, values: int, heads: int, block: int, halo: int, stride: int = 1):
        super().__init__()
        self.heads, self.sizes = heads, (block, halo, stride)
        self.q = nn.Conv2d(channels, channels, 1, stride, bias=False)
        self.k, self.v = nn.Conv2d(channels, channels, 1, bias=False), nn.Conv2d(channels, values, 1, bias=False)
        size, reach = channels // heads, 2 * (block + 2 * halo) - 1
        self.tables = nn.ParameterList(torch.randn(reach, size) * size**-0.5 for _ in range(2))

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b v y2 x2"]:
        maps = (self.q(x), self.k(x), self.v(x))
        q, k, v = (rearrange(m, "b (h d) y x -> b h (y x) d", h=self.heads) for m in maps)
        halo = Halo((x.shape[2], x.shape[3]), *self.sizes)
        out = halo_attention(q, k, v, list(self.tables), halo)
        return rearrange(out, "b h (y x) d -> b (h d) y x", y=halo.out_sides[0])


class Bottleneck(nn.Module):
    """x + W3 act(halo(act(W1 x))), batch norm behind each; where the shape changes x goes through a convolution."""

    def __init__(self, before: int, width: int, heads: int, size: Size, stride: int):
        super().__init__()
        after, values = int(width * size.wider), int(width * size.value)
        self.narrow = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.halo = HaloMap(width, values, heads, size.block, size.halo, stride)
        self.widen = nn.Sequential(
            nn.BatchNorm2d(values), nn.SiLU(), nn.Conv2d(values, after, 1, bias=False), nn.BatchNorm2d(after)
        )
        same = before == after and stride == 1
        along = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.along = nn.Identity() if same else along

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c2 y2 x2"]:
        return nn.functional.silu(self.along(x) + self.widen(self.halo(self.narrow(x))))


class HaloNets(nn.Module):
    """A picture to logits: 7 x 7 convolution and pooling, four stages of bottlenecks, mean, a linear head.

    size: "h0" to "h7", or a `Size` of your own; pictures may be of any size, the table's is what it was trained on

    Raises:
        UnknownName: none of these.
    """

    def __init__(self, size: str | Size = "h0", classes: int = 1000, colours: int = 3):
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise UnknownName("HaloNet", size, SIZES, "Give one of these, or a Size.")
        self.size = made = SIZES[size] if isinstance(size, str) else size
        first = WIDTHS[0]
        self.stem = nn.Sequential(
            nn.Conv2d(colours, first, 7, 2, 3, bias=False), nn.BatchNorm2d(first), nn.SiLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, before = [], first
        for stage, (width, heads, depth) in enumerate(zip(WIDTHS, HEADS, made.depths)):
            for i in range(depth):
                blocks.append(Bottleneck(before, width, heads, made, 2 if stage and not i else 1))
                before = int(width * made.wider)
        if made.last:
            blocks += [nn.Conv2d(before, made.last, 1, bias=False), nn.BatchNorm2d(made.last), nn.SiLU()]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(made.last or before, classes)

    def forward(self, images: Float[Tensor, "b colours height width"]) -> Float[Tensor, "b classes"]:
        """Logits of each picture."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))
