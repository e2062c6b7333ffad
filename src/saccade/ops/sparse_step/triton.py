"""One step of sparse decoding in four kernels, none of which waits for the host. Each starts while the one before it
ends, where the device can."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from saccade.ops.decode import triton as decoding
from saccade.ops.page_bounds import triton as bounds
from saccade.ops.topk import triton as choosing


def step(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    low: Float[Tensor, "b g p d"],
    high: Float[Tensor, "b g p d"],
    *,
    page_tokens: int,
    keep_pages: int,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """See the op's api."""
    scores = bounds.page_scores(q, low, high, by_group=True)
    index = choosing.topk(scores, keep_pages, follows=True)
    options = {"page_tokens": page_tokens, "scale": scale, "softcap": softcap}
    return decoding.decode(q, k, v, index, None, **options, follows=True)
