"""Tensors that change hands between processes: tokens for heads, and back. Differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from saccade.core.layout import Layout

Exchange = Callable[[Tensor, Layout], Tensor]


def to_heads(x: Float[Tensor, "b h m d"], layout: Layout) -> Float[Tensor, "b l n d"]:
    """From all heads of the tokens here to the heads here of all tokens; rank i has the i-th of equal parts of them."""
    return _Exchange.apply(x, layout, _to_heads, _to_tokens)


def to_tokens(x: Float[Tensor, "b l n d"], layout: Layout) -> Float[Tensor, "b h m d"]:
    """The way back."""
    return _Exchange.apply(x, layout, _to_tokens, _to_heads)


def all_tokens(x: Float[Tensor, "b m *rest"], layout: Layout) -> Float[Tensor, "b n *rest"]:
    """Of all tokens, from those here. Gradients are those of a mean over processes that all go on with the whole: the
    part for the tokens here, as many times as there are processes.
    """
    return _AllTokens.apply(x, layout)


def all_heads(x: Float[Tensor, "b l n d"], layout: Layout) -> Float[Tensor, "b h n d"]:
    """Of all heads, from those here. Without gradients."""
    there = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(layout.ranks)]
    dist.all_gather(there, x.detach().contiguous(), group=layout.group)
    return torch.cat(there, 1)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, go: Exchange, back: Exchange) -> Tensor:
        ctx.layout, ctx.back = layout, back
        return go(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.back(grad, ctx.layout), None, None, None


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        most = max(layout.counts)
        padded = x.new_zeros(x.shape[0], most, *x.shape[2:])
        padded[:, : x.shape[1]] = x
        there = [torch.empty_like(padded) for _ in range(layout.ranks)]
        dist.all_gather(there, padded, group=layout.group)
        return layout.join([part[:, :count] for part, count in zip(there, layout.counts)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.layout.cut(grad, 1) * ctx.layout.ranks, None


def _to_heads(x: Tensor, layout: Layout) -> Tensor:
    b, _, _, d = x.shape
    parts = x.chunk(layout.ranks, 1)
    heads = parts[0].shape[1]
    return layout.join(_swapped(parts, [(b, heads, count, d) for count in layout.counts], layout), 2)


def _to_tokens(x: Tensor, layout: Layout) -> Tensor:
    b, heads, _, d = x.shape
    parts = [
        torch.cat([x[:, :, first:last] for first, last in layout.chunks(rank)], 2) for rank in range(layout.ranks)
    ]
    return torch.cat(_swapped(parts, [(b, heads, layout.here, d)] * layout.ranks, layout), 1)


def _swapped(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], layout: Layout) -> list[Tensor]:
    """Every process gives each other one a part, and gets one of these shapes from each."""
    given = torch.cat([part.flatten() for part in parts])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    got = given.new_empty(sum(sizes))
    dist.all_to_all_single(got, given, sizes, [part.numel() for part in parts], group=layout.group)
    return [part.view(*shape) for part, shape in zip(got.split(sizes), shapes)]
