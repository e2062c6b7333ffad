"""By the logits of all pairs: those of each antidiagonal are picked out of them."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def antidiagonal_mass(
    q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], *, block: int, stride: int, scale: float,
    softcap: float | None,
) -> Float[Tensor, "b h nqb nkb"]:  # fmt: skip
    """See the op's api."""
    kind, queries, keys = torch.promote_types(q.dtype, torch.float32), q.shape[2], k.shape[2]
    logits = q.to(kind) @ k.to(kind).repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    logits = pad(logits, (0, -keys % stride, 0, -queries % stride))
    groups = rearrange(logits, "b h (t i) (u j) -> b h t u i j", i=stride, j=stride)
    mean = groups.flip(-1).diagonal(dim1=-2, dim2=-1).sum(-1) / stride
    return of_logits(mean, queries, keys, block=block, stride=stride, softcap=softcap)


def of_logits(
    mean: Float[Tensor, "b h t u"], queries: int, keys: int, *, block: int, stride: int, softcap: float | None
) -> Float[Tensor, "b h nqb nkb"]:
    """From the mean logit of every pair of groups on."""
    mean = mean if softcap is None else softcap * torch.tanh(mean / softcap)
    end = torch.arange(1, mean.shape[2] + 1, device=mean.device) * stride + keys - queries
    ahead = torch.arange(mean.shape[3], device=mean.device) * stride >= end.clamp(max=keys)[:, None]
    share = mean.masked_fill(ahead, -torch.inf).softmax(-1)
    each, count = block // stride, torch.ones(mean.shape[2], device=mean.device, dtype=mean.dtype)
    share = pad(share, (0, -mean.shape[3] % each, 0, -mean.shape[2] % each))
    total = reduce(share, "b h (t r) (u c) -> b h t u", "sum", r=each, c=each)
    return total / reduce(pad(count, (0, -len(count) % each)), "(t r) -> t 1", "sum", r=each)
