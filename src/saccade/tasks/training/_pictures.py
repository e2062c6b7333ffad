"""Pictures with a class each: which are trained on, and which are held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core import rng
from saccade.tasks.training._base import Batch


@dataclass(frozen=True, eq=False)
class Pictures:
    """All pictures, shuffled once, the same for everyone; the first `held` are held out."""

    images: Float[Tensor, "n c h w"]
    classes: Int[Tensor, " n"]
    held: int

    @classmethod
    def of(cls, name: str, images: Tensor, classes: Tensor, share: float) -> Pictures:
        """With a share of them held out."""
        order = torch.randperm(len(images), generator=rng.generator(f"split/{name}"))
        return cls(images[order], classes[order], int(share * len(images)))

    def drawn(self, name: str, step: int, rows: int, seed: int) -> Batch:
        """Those of a step."""
        draw = rng.generator(f"train/{name}", seed, step)
        which = torch.randint(self.held, len(self.images), (rows,), generator=draw)
        return Batch(self.images[which], self.classes[which])

    def judged(self, rows: int) -> list[Batch]:
        """Those held out."""
        pairs = zip(self.images[: self.held].split(rows), self.classes[: self.held].split(rows))
        return [Batch(images, classes) for images, classes in pairs]
