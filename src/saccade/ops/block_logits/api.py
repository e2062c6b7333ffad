"""The largest logit between some queries and each of the key blocks listed for them: what a tree search asks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCORES = 2**20  # key elements gathered at once: 4 MiB in float32, which stays in a CPU cache
SCORES_CUDA = 2**27  # a launch takes as long as millions of them


def block_logits(
    q: Float[Tensor, "b h n r d"],
    k: Float[Tensor, "b g k d"],
    first: Int[Tensor, " n"],
    width: int,
    blocks: Int[Tensor, "b h n l"],
) -> Float[Tensor, "b h n l"]:
    """max q . k over the r queries of a group and the tokens of each block: from `first` on, `width` tokens each.

    A few groups at a time: the keys are gathered for each. Tokens past the last key stand for the last.
    """
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
        logits = q[:, :, i : i + step].float() @ keys.float().mT
        out.append(logits.amax(-2).unflatten(-1, (l, width)).amax(-1))
    return torch.cat(out, 2)
