"""One small language model and one small vision model: pre-norm residual blocks around whatever mixes the tokens.

x <- x + mixer(norm(x));  x <- x + W2 gelu(W1 norm(x)).  All else is the same for every mixer, initial weights included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.errors import BadInput
from saccade.core.method import Slot
from saccade.core.site import State
from saccade.methods.nets._slot import Spec, make_mixer

WIDER = 4  # of the layer inside a block over its channels
SPREAD = 0.02  # standard deviation of the embeddings at the start


class Block(nn.Module):
    """One layer: mix tokens, then work on each by itself."""

    def __init__(self, slot: Slot, mixer: Spec):
        super().__init__()
        c = slot.channels
        self.before, self.between = nn.RMSNorm(c), nn.RMSNorm(c)
        with drawn(slot.seed, "mixer", slot.layer):
            self.mixer = make_mixer(mixer, slot)
        with drawn(slot.seed, "mlp", slot.layer):
            self.mlp = nn.Sequential(nn.Linear(c, WIDER * c), nn.GELU(), nn.Linear(WIDER * c, c))

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        mixed, state = self.mixer(self.before(x), state, lengths)
        x = x + mixed
        return x + self.mlp(self.between(x)), state

    def step(self, x: Float[Tensor, "b c"], state: State) -> tuple[Float[Tensor, "b c"], State]:
        """One token of each row."""
        mixed, state = self.mixer.step(self.before(x), state)
        x = x + mixed
        return x + self.mlp(self.between(x)), state


class LanguageModel(nn.Module):
    """Tokens to logits for the next one: embedding, blocks, norm, and the embedding again as the head.

    vocabulary: how many tokens there are; 256 for bytes
    mixer: as `make_mixer` takes it. budget, seed: see `Slot`; the seed draws the initial weights too

    Raises:
        what `make_mixer` and `Slot` raise.
    """

    _no_split_modules = ("Block",)  # what accelerate shards one by one

    def __init__(
        self,
        vocabulary: int,
        *,
        mixer: Spec = "full",
        channels: int = 128,
        layers: int = 2,
        heads: int = 4,
        budget: float | str | Budget = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        slots = _slots(channels, heads, layers, budget, seed, causal=True, grid=None)
        with drawn(seed, "embedding"):
            self.embedding = nn.Embedding(vocabulary, channels)
            nn.init.normal_(self.embedding.weight, std=SPREAD)
        self.blocks = nn.ModuleList(Block(slot, mixer) for slot in slots)
        self.norm = nn.RMSNorm(channels)

    def forward(
        self, tokens: Int[Tensor, "b n"], state: list[State] | None = None, lengths: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b n vocabulary"], list[State]]:
        """Logits after each token, and where `step` goes on; `lengths`: real tokens of rows padded behind them."""
        x, states = self.embedding(tokens), []
        for i, block in enumerate(self.blocks):
            x, new = block(x, state[i] if state else None, lengths)
            states.append(new)
        return self.norm(x) @ self.embedding.weight.T, states

    def step(
        self, tokens: Int[Tensor, " b"], state: list[State]
    ) -> tuple[Float[Tensor, "b vocabulary"], list[State]]:
        """Logits after one more token of each row."""
        x, states = self.embedding(tokens), []
        for block, old in zip(self.blocks, state, strict=True):
            x, new = block.step(x, old)
            states.append(new)
        return self.norm(x) @ self.embedding.weight.T, states


class VisionModel(nn.Module):
    """A picture to logits over classes: square patches with a learned place each, blocks, norm, mean, a linear head.

    image: channels, rows and columns of a picture; patch: rows and columns of a patch, which must divide them
    mixer, budget, seed: as in `LanguageModel`; the slot tells the mixer the grid of patches

    Raises:
        BadInput: patches that do not tile the picture.
    """

    _no_split_modules = ("Block",)

    def __init__(
        self,
        classes: int,
        image: tuple[int, int, int],
        *,
        patch: int = 2,
        mixer: Spec = "full",
        channels: int = 64,
        layers: int = 2,
        heads: int = 4,
        budget: float | str | Budget = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        colours, height, width = image
        if height % patch or width % patch:
            asked = f"patches of {patch} x {patch} of a picture of {height} x {width}"
            raise BadInput(asked, "they do not tile it", "Give a size that divides both.")
        self.patch, grid = patch, (height // patch, width // patch)
        with drawn(seed, "patches"):
            self.patches = nn.Linear(colours * patch * patch, channels)
            self.places = nn.Embedding(grid[0] * grid[1], channels)
            nn.init.normal_(self.places.weight)
        slots = _slots(channels, heads, layers, budget, seed, causal=False, grid=grid)
        self.blocks = nn.ModuleList(Block(slot, mixer) for slot in slots)
        self.norm = nn.RMSNorm(channels)
        with drawn(seed, "head"):
            self.head = nn.Linear(channels, classes)

    def forward(self, images: Float[Tensor, "b colours height width"]) -> Float[Tensor, "b classes"]:
        """Logits of each picture."""
        cells = rearrange(images, "b c (h y) (w x) -> b (h w) (c y x)", y=self.patch, x=self.patch)
        x = self.patches(cells) + self.places.weight
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x).mean(1))


def _slots(channels: int, heads: int, layers: int, budget: float | str | Budget, seed: int, **place) -> list[Slot]:
    budget = Budget.of(budget)
    return [
        Slot(channels, heads, layer=layer, layers=layers, budget=budget, seed=seed, **place) for layer in range(layers)
    ]


@contextlib.contextmanager
def drawn(seed: int, *name: object) -> Iterator[None]:
    """Initial weights of one part from a stream of its own: another mixer leaves all other parts as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("init", seed, *name))
        yield
