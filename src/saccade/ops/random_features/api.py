"""Random features: vectors whose products estimate exp(x . y), so that attention becomes linear in its length."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput


def orthogonal_directions(many: int, size: int, draw: torch.Generator) -> Float[Tensor, "many size"]:
    """Gaussian directions, each like any other, but orthogonal in blocks of `size`: estimates then vary less.

    Blocks are of a uniform (Haar) rotation; the lengths are those of vectors of independent Gaussians.

    Raises:
        BadInput: no direction, or one of no size.
    """
    if many < 1 or size < 1:
        raise BadInput(f"{many} directions of size {size}", "there is nothing to draw", "Ask for one or more of each.")
    blocks = []
    for _ in range(-(-many // size)):
        rotation, upper = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
        blocks.append((rotation * upper.diagonal().sign()).mT)  # the signs make it uniform
    lengths = torch.randn(many, size, generator=draw, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return torch.cat(blocks)[:many] * lengths


def log_features(
    x: Float[Tensor, "*n d"], directions: Float[Tensor, "many d"], scale: float
) -> Float[Tensor, "*n features"]:
    """Logarithms of positive features, two for each direction w:  +-sqrt(scale) w . x - scale |x|^2 / 2 - log(m) / 2,

    m = 2 many. Over directions drawn,  E[sum_f exp(log_f(q) + log_f(k))] = exp(scale q . k). In float32 or better. A
    caller takes what is common out of them before it raises them, so that nothing overflows.
    Source: arXiv 2009.14794, lemma 1 (the hyperbolic cosine).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * math.sqrt(scale)
    along = x @ directions.to(x).mT
    least = x.square().sum(-1, keepdim=True) / 2 + math.log(2 * len(directions)) / 2
    return torch.cat([along, -along], -1) - least
