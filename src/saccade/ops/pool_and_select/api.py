"""Choose key blocks by the scores of pooled queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.selection import Blocks
from saccade.ops import device, dispatch
from saccade.ops.attend.api import check


def pool_blocks(
    x: Float[Tensor, "b h n d"], block: int, how: Literal["mean", "max", "min"] = "mean"
) -> Float[Tensor, "b h nb d"]:
    """Pool tokens by blocks; the last block over the tokens it really has."""
    n = x.shape[2]
    pad = -n % block
    fill = {"mean": 0.0, "max": -torch.inf, "min": torch.inf}[how]
    blocks = torch.nn.functional.pad(x.float(), (0, 0, 0, pad), value=fill).unflatten(2, (-1, block))
    if how == "max":
        return blocks.amax(3)
    if how == "min":
        return blocks.amin(3)
    size = torch.full((blocks.shape[2], 1), float(block), device=x.device)
    size[-1] -= pad
    return blocks.sum(3) / size


@torch.no_grad()
def pool_and_select(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    *,
    keep_blocks: int,
    q_block: int = 64,
    k_block: int = 64,
    how: Literal["mean", "max"] = "mean",
    force_sink: bool = False,
    force_diagonal: bool = False,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> Blocks:
    """For each query block the `keep_blocks` causal key blocks whose pooled keys match its pooled query best.

    Row i keeps min(keep_blocks, causal key blocks of row i). Forced blocks are counted in. It has no gradient.

    impl: "auto", "torch", "triton" (CUDA; first there; takes the first of equal scores)
    report: is told which back end ran, as "pool_and_select:torch"

    Raises:
        BadInput: queries and keys that do not fit together, or nothing to keep.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, k, k)
    if min(keep_blocks, q_block, k_block) < 1:
        asked = f"keep {keep_blocks} blocks of {k_block} keys for blocks of {q_block} queries"
        raise BadInput(asked, "each is 1 or more", "Give such numbers.")
    options = {"keep_blocks": keep_blocks, "q_block": q_block, "k_block": k_block}
    forced = {"force_sink": force_sink, "force_diagonal": force_diagonal}
    if dispatch.pick("pool_and_select", impl, _back_ends(q, k, k_block), report) == "torch":
        return _by_torch(q, k, how=how, **options, **forced)
    from saccade.ops.pool_and_select import triton as kernels

    return kernels.pool_and_select(q, k, mean=how == "mean", **options, **forced)


def _back_ends(q: Tensor, k: Tensor, k_block: int) -> dict[str, Callable[[], dispatch.Reasons]]:
    def by_triton() -> list[str]:
        if not device.installed():
            return device.triton_reasons(q)
        from saccade.ops.pool_and_select import triton as kernels

        return kernels.reasons(q, k, k_block)

    return dispatch.with_triton(q, by_triton, {"torch": list})


def _by_torch(
    q: Tensor,
    k: Tensor,
    *,
    keep_blocks: int,
    q_block: int,
    k_block: int,
    how: Literal["mean", "max"],
    force_sink: bool,
    force_diagonal: bool,
) -> Blocks:
    queries, keys = q.shape[2], k.shape[2]
    pooled_q, pooled_k = pool_blocks(q, q_block, how), pool_blocks(k, k_block, how)
    pooled_k = pooled_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = pooled_q @ pooled_k.mT
    nqb, nkb = score.shape[-2:]
    end = (torch.arange(1, nqb + 1, device=q.device) * q_block).clamp(max=queries) + keys - queries
    last = (end - 1) // k_block
    block = torch.arange(nkb, device=q.device)
    if force_sink:
        score[..., 0] = torch.inf
    if force_diagonal:
        score = score.masked_fill(block == last[:, None], torch.inf)
    allowed = block <= last[:, None]
    score = score.masked_fill(~allowed, -torch.inf)
    top = score.topk(min(keep_blocks, nkb), -1).indices
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, True) & allowed
    return Blocks.of(keep, queries=queries, keys=keys, q_block=q_block, k_block=k_block)
