"""The attention map by blocks: the largest weight in each, found a few rows at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from saccade.core.errors import BadInput
from saccade.core.selection import causal_mask
from saccade.ops.attend.api import check

LOGITS = 2**23  # at once: 32 MiB in float32
LOGITS_CUDA = 2**28


@torch.no_grad()
def pooled_map(
    q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], block: int, *, scale: float, softcap: float | None = None
) -> Float[Tensor, "b h nqb nkb"]:
    """max over each block of softmax(scale q k^T), causal, the queries being the last of the keys.

    G[I, J] = max_{i in I} exp(max_{j in J} s_ij - lse_i): of the rows of some blocks of queries at a time, so that no
    map of all rows is held. Query blocks are counted from the first query, key blocks from the first key. Float32 or
    better; for training: it has no gradient.

    Raises:
        BadInput: queries and keys that do not fit together, more queries than keys, or an empty block.
    """
    check(q, k, k)
    (b, h, queries, _), keys = q.shape, k.shape[2]
    if block < 1 or queries > keys:
        asked = f"the map of {queries} queries over {keys} keys in blocks of {block}"
        raise BadInput(asked, "a row must see its own key, and a block holds one", "Give all keys and such a block.")
    most = LOGITS_CUDA if q.is_cuda else LOGITS
    step = max(1, most // (b * h * keys * block)) * block
    out = [_rows(q[:, :, i : i + step], k, i + keys - queries, block, scale, softcap) for i in range(0, queries, step)]
    return torch.cat(out, 2)


def _rows(
    q: Float[Tensor, "b h r d"], k: Tensor, first: int, block: int, scale: float, softcap: float | None
) -> Float[Tensor, "b h nqb nkb"]:
    """Of rows that begin at key `first`; nothing is computed of the keys behind the last of them."""
    kind, rows, end = torch.promote_types(q.dtype, torch.float32), q.shape[2], first + q.shape[2]
    near = k[:, :, :end].to(kind)
    logits = (q.to(kind).unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ near.mT).view(*q.shape[:3], end) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill_(~causal_mask(rows, end, q.device), -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    best = pad(logits, (0, -end % block), value=-torch.inf).unflatten(-1, (-1, block)).amax(-1)
    weights = pad(torch.exp(best - lse), (0, 0, 0, -rows % block)).unflatten(2, (-1, block)).amax(3)
    return pad(weights, (0, -(-k.shape[2] // block) - weights.shape[-1]))
