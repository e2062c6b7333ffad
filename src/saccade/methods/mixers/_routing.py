"""What layers do that send tokens to clusters: points that are pulled on the way back, and tokens by their places."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Learning(torch.autograd.Function):
    """Points as they are. On the way back they are pulled to their centroids, and these follow them."""

    @staticmethod
    def forward(ctx, points, real, layer):
        pull, chosen = layer.pull(points.detach(), real)
        ctx.save_for_backward(points, pull, chosen)
        ctx.layer = layer
        return points.view_as(points)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        points, pull, chosen = ctx.saved_tensors
        ctx.layer.learn(points, chosen)
        return grad + pull, None, None


def normed(x: Tensor) -> Tensor:
    """Zero mean, unit variance, over the channels."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def taken(x: Float[Tensor, "b r n d"], index: Int[Tensor, "b r m"]) -> Float[Tensor, "b r m d"]:
    """Tokens at these places."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
