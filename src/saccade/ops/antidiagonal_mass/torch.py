"""One product of groups laid out as long rows: the keys of each in reverse, so that it sums along antidiagonals."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

LOGITS = 2**22  # at once: 16 MiB in float32
LOGITS_CUDA = 2**27


def antidiagonal_mass(
    q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], *, block: int, stride: int, scale: float,
    softcap: float | None,
) -> Float[Tensor, "b h nqb nkb"]:  # fmt: skip
    """See the op's api."""
    (b, h, queries, _), keys = q.shape, k.shape[2]
    kind = torch.promote_types(q.dtype, torch.float32)
    rows = _groups(q, stride).flatten(-2).to(kind)
    columns = _groups(k, stride).flip(-2).flatten(-2).to(kind)
    out = torch.zeros(b, h, -(-queries // block), -(-keys // block), dtype=kind, device=q.device)
    each = block // stride
    most = LOGITS_CUDA if q.is_cuda else LOGITS
    step = max(1, most // (b * h * columns.shape[2] * each)) * each
    for t in range(0, rows.shape[2], step):
        some = rows[:, :, t : t + step]
        end = torch.arange(t + 1, t + some.shape[2] + 1, device=q.device) * stride + keys - queries
        last = min((t + some.shape[2]) * stride + keys - queries, keys)
        near = columns[:, :, : -(-last // stride)]
        logits = (some.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ near.mT).view(b, h, -1, near.shape[2])
        logits = logits.mul_(scale / stride)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        ahead = torch.arange(near.shape[2], device=q.device) * stride >= end.clamp(max=keys)[:, None]
        share = logits.masked_fill_(ahead, -torch.inf).softmax(-1)
        wide = pad(share, (0, -share.shape[3] % each)).unflatten(-1, (-1, each)).sum(-1)
        mean = _row_means(wide, each)
        out[:, :, t // each : t // each + mean.shape[2], : mean.shape[3]] = mean
    return out


def _groups(x: Float[Tensor, "b h n d"], stride: int) -> Float[Tensor, "b h m s d"]:
    """Tokens `stride` at a time, zeros behind the last."""
    return pad(x, (0, 0, 0, -x.shape[2] % stride)).unflatten(2, (-1, stride))


def _row_means(x: Float[Tensor, "b h t n"], each: int) -> Float[Tensor, "b h m n"]:
    """Of `each` rows at a time; the last of those there are."""
    whole = x.shape[2] - x.shape[2] % each
    parts = [x[:, :, :whole].unflatten(2, (whole // each, each)).mean(3)]
    return torch.cat([*parts, x[:, :, whole:].mean(2, keepdim=True)], 2) if whole < x.shape[2] else parts[0]
