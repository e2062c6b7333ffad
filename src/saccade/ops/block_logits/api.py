"""The largest logit between some queries and each of the key blocks listed for them: what a tree search asks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.ops import device, dispatch

SCORES = 2**20  # key elements gathered at once: 4 MiB in float32, which stays in a CPU cache
SCORES_CUDA = 2**27  # there a launch takes as long as millions of them


def block_logits(
    q: Float[Tensor, "b h n r d"],
    k: Float[Tensor, "b g k d"],
    first: Int[Tensor, " n"],
    width: int,
    blocks: Int[Tensor, "b h n l"],
    *,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> Float[Tensor, "b h n l"]:
    """max q . k over the r queries of a group and the tokens of each block: from `first` on, `width` tokens each.

    Tokens past the last key stand for the last. float32 or better.

    impl: "auto", "torch", "triton" (CUDA; first there)
    report: is told which back end ran, as "block_logits:torch"

    Raises:
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    if dispatch.pick("block_logits", impl, _back_ends(q, k, blocks), report) == "torch":
        return _by_torch(q, k, first, width, blocks)
    from saccade.ops.block_logits import triton as kernels

    return kernels.block_logits(q, k, first, width, blocks)


def _back_ends(q: Tensor, k: Tensor, blocks: Tensor) -> dict[str, Callable[[], dispatch.Reasons]]:
    def by_triton() -> list[str]:
        if not device.installed():
            return device.triton_reasons(q)
        from saccade.ops.block_logits import triton as kernels

        return kernels.reasons(q, k, blocks)

    return dispatch.with_triton(q, by_triton, {"torch": list})


def _by_torch(q: Tensor, k: Tensor, first: Tensor, width: int, blocks: Tensor) -> Tensor:
    """A few groups at a time: the keys are gathered for each."""
    b, h, n, l = blocks.shape
    step = max(1, (SCORES_CUDA if q.is_cuda else SCORES) // (b * h * l * width * q.shape[-1]))
    flat, tokens = k.reshape(-1, k.shape[-1]), k.shape[2]
    row = torch.arange(b, device=q.device)[:, None] * k.shape[1] + torch.arange(h, device=q.device) // (h // k.shape[1])
    out = []
    for i in range(0, n, step):
        token = first[i : i + step, None] + blocks[:, :, i : i + step] * width
        token = (token[..., None] + torch.arange(width, device=q.device)).flatten(-2).clamp(max=tokens - 1)
        place = token + row[..., None, None] * tokens
        keys = flat.index_select(0, place.flatten()).view(*place.shape, -1)  # not k[row, head, token]: slow
        kind = torch.promote_types(q.dtype, torch.float32)
        logits = q[:, :, i : i + step].to(kind) @ keys.to(kind).mT
        out.append(logits.amax(-2).unflatten(-1, (l, width)).amax(-1))
    return torch.cat(out, 2)
