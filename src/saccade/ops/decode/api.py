"""A few new queries over stored keys."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.selection import Gather, causal_mask
from saccade.ops.attend import reference


def decode(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k d"],
    index: Int[Tensor, "b h q l"] | None = None,
    *,
    visible: Bool[Tensor, "b h q k"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """The last `q` of `k` tokens read all keys before them, or just those in `index` (-1: none).

    visible: further narrows what each query sees. Causal among the queries themselves.
    """
    mask = causal_mask(q.shape[2], k.shape[2], q.device)[None, None]
    if index is not None:
        mask = Gather(index=index, queries=q.shape[2], keys=k.shape[2]).mask()
    if visible is not None:
        mask = mask & visible
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.masked(q, k, v, torch.as_tensor(mask), scale=scale, softcap=softcap)
