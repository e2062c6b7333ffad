"""The nets of BiFormer: four stages of bi-level routing attention, ever fewer and wider tokens; the last is dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from saccade.core.errors import UnknownName
from saccade.core.method import Slot
from saccade.methods.nets._slot import make_mixer

EPS = 1e-6
STEM = 4  # pixels of a cell of the first stage


@dataclass(frozen=True)
class Size:
    """channels: of the first stage, twice as many in each that follows; depths: blocks of each stage
    topk: regions of each stage, 0: dense attention; regions: along each axis of a map; head: channels of a head
    wider: channels inside the MLP over those outside
    swin: patches, merging and norms of Swin, and no convolution in front of each block ("STL")
    """

    channels: int
    depths: tuple[int, int, int, int]
    topk: tuple[int, int, int, int] = (1, 4, 16, 0)
    regions: int = 7
    head: int = 32
    wider: int = 3
    swin: bool = False


SIZES = {
    "t": Size(64, (2, 2, 8, 2)),
    "s": Size(64, (4, 4, 18, 4)),
    "b": Size(96, (4, 4, 18, 4)),
    "stl": Size(96, (2, 2, 6, 2), wider=4, swin=True),
}


class Dense(nn.Module):
    """Attention over all tokens, and a depthwise 5 x 5 convolution over what comes in; of the last stage."""

    def __init__(self, channels: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv, self.out = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels)
        self.lepe = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)

    def forward(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n c"], None]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out = rearrange(nn.functional.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return self.out(out + on_map(self.lepe, x, self.grid)), None


class Block(nn.Module):
    """x + conv(x), then x + attention(norm(x)), then x + mlp(norm(x)); in training each is left out now and then."""

    def __init__(self, size: Size, stage: int, grid: tuple[int, int], drop_path: float):
        super().__init__()
        c = size.channels << stage
        self.grid, self.drop_path = grid, drop_path
        self.place = None if size.swin else nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.before, self.between = nn.LayerNorm(c, eps=EPS), nn.LayerNorm(c, eps=EPS)
        if size.topk[stage]:
            side = -(-max(grid) // size.regions)
            slot = Slot(c, c // size.head, causal=False, layer=stage, grid=grid)
            self.mixer = make_mixer(f"biformer:side={side},topk={size.topk[stage]}", slot)
        else:
            self.mixer = Dense(c, c // size.head, grid)
        self.mlp = nn.Sequential(nn.Linear(c, size.wider * c), nn.GELU(), nn.Linear(size.wider * c, c))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        if self.place is not None:
            x = x + on_map(self.place, x, self.grid)
        x = x + self._kept(self.mixer(self.before(x))[0])
        return x + self._kept(self.mlp(self.between(x)))

    def _kept(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Of some pictures nothing, of the others that much more."""
        return x * nn.functional.dropout(x.new_ones(len(x), 1, 1), self.drop_path, self.training)


class Merge(nn.Module):
    """Four cells to one, as Swin does: norm, then a linear map of the four side by side."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.map = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c2 y2 x2"]:
        x = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        cells = rearrange(x, "b c (y dy) (x dx) -> b y x (dx dy c)", dy=2, dx=2)
        return rearrange(self.map(self.norm(cells)), "b y x c -> b c y x")


class BiFormers(nn.Module):
    """A picture to logits: four stages, each at half the resolution of the last, norm, mean, a linear head.

    size: "t", "s", "b", "stl", or a `Size` of your own
    image: rows and columns of the pictures, which are square; 224 gives maps of 56, 28, 14 and 7
    drop_path: share of pictures for which the last block is left out in training; it rises from 0 in the first

    Raises:
        UnknownName: none of these sizes.
    """

    def __init__(
        self, size: str | Size = "t", classes: int = 1000, colours: int = 3, image: int = 224, drop_path: float = 0.0
    ):
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise UnknownName("BiFormer", size, SIZES, "Give one of these, or a Size.")
        made = SIZES[size] if isinstance(size, str) else size
        drops = iter(torch.linspace(0, drop_path, sum(made.depths), device="cpu").tolist())
        self.stems, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage, depth in enumerate(made.depths):
            image = -(-image // (2 if stage else STEM))
            self.stems.append(stem(made, stage, colours))
            self.stages.append(nn.Sequential(*[Block(made, stage, (image, image), next(drops)) for _ in range(depth)]))
        last = made.channels << len(made.depths) - 1
        self.norm = nn.LayerNorm(last) if made.swin else nn.BatchNorm1d(last)
        self.swin, self.head = made.swin, nn.Linear(last, classes)

    def forward(self, images: Float[Tensor, "b colours side side"]) -> Float[Tensor, "b classes"]:
        """Logits of each picture."""
        x = images
        for halve, blocks in zip(self.stems, self.stages):
            x = halve(x)
            x = rearrange(blocks(rearrange(x, "b c y x -> b (y x) c")), "b (y x) c -> b c y x", y=x.shape[2])
        x = x.flatten(2)
        return self.head((self.norm(x.mT).mT if self.swin else self.norm(x)).mean(2))


def stem(size: Size, stage: int, colours: int) -> nn.Module:
    """What comes before a stage: to fewer cells of more channels."""
    c = size.channels << stage
    if size.swin:
        return Merge(c // 2) if stage else nn.Sequential(nn.Conv2d(colours, c, STEM, STEM), OverChannels(c))
    if stage:
        return nn.Sequential(nn.Conv2d(c // 2, c, 3, 2, 1), nn.BatchNorm2d(c))
    first = nn.Conv2d(colours, c // 2, 3, 2, 1), nn.BatchNorm2d(c // 2), nn.GELU()
    return nn.Sequential(*first, nn.Conv2d(c // 2, c, 3, 2, 1), nn.BatchNorm2d(c))


class OverChannels(nn.LayerNorm):
    """Layer norm of each cell of a map."""

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def on_map(work: Callable[[Tensor], Tensor], x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Tensor:
    """Tokens as a map, and back."""
    return work(x.mT.unflatten(2, grid)).flatten(2).mT
