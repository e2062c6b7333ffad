"""Two passes over tiles of keys: first each row's normaliser, then the columns. Never more than [rows, TILE] logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

TILE = 2048  # keys
ROWS = 256  # queries at a time


def column_scores(
    q: Float[Tensor, "b h w d"], k: Float[Tensor, "b g k d"], *, scale: float, softcap: float | None, causal: bool,
    at: Int[Tensor, " w"] | None = None,
) -> Float[Tensor, "b h k"]:  # fmt: skip
    """sum over the rows of softmax(scale q k^T)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(*q.shape[:2], k.shape[2], dtype=wide, device=q.device)
    rows = q.unflatten(1, (k.shape[1], -1))
    sums = out.unflatten(1, (k.shape[1], -1))
    for first in range(0, q.shape[2], ROWS):
        some = rows[:, :, :, first : first + ROWS].to(wide)
        last = k.shape[2] - q.shape[2] + first if causal else None
        position = last if at is None else at[first : first + ROWS]
        top, total = _normaliser(s for _, s in _tiles(some, k, scale, softcap, position))
        for a, s in _tiles(some, k, scale, softcap, position):
            sums[..., a : a + s.shape[-1]] += s.sub_(top).exp_().div_(total).sum(-2)
    return out


def _normaliser(tiles: Iterator[Tensor]) -> tuple[Float[Tensor, "b g s w 1"], Float[Tensor, "b g s w 1"]]:
    """Each row's largest logit, and its sum of exponentials below that; the first tile has a key for every row."""
    tops, totals = zip(*[(t, s.sub_(t).exp_().sum(-1, keepdim=True)) for s in tiles for t in [_top(s)]])
    top = torch.stack(tops).amax(0)
    return top, sum(total * torch.exp(t - top) for t, total in zip(tops, totals))


def _top(s: Tensor) -> Tensor:
    return s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)


def _tiles(
    q: Float[Tensor, "b g s w d"], k: Tensor, scale: float, softcap: float | None, position: int | Tensor | None
) -> Iterator[tuple[int, Float[Tensor, "b g s w t"]]]:
    """First key and logits of each tile; the key of the first row, or of each, is `position`; None: every row sees all.
    """
    b, g, s, w, _ = q.shape
    end = position + w if isinstance(position, int) else k.shape[2]
    for a in range(0, end, TILE):
        z = min(a + TILE, end)
        logits = (q.flatten(2, 3) @ k[:, :, a:z].to(q.dtype).mT).view(b, g, s, w, z - a)
        logits.mul_(scale)  # not the queries: they would be rounded once more
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        row = position
        if isinstance(position, int):  # where no row has keys ahead there is nothing to hide
            row = torch.arange(position, position + w, device=q.device) if z > position + 1 else None
        if row is not None:
            row = row[:, None]
            logits.masked_fill_(torch.arange(a, z, device=q.device) > row, -torch.inf)
        yield a, logits
