"""What the last queries of a prompt vote for: SnapKV's rule, which later papers share out otherwise."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput, BadOption
from saccade.core.site import Seen, Site
from saccade.ops.column_scores.api import column_scores


@torch.no_grad()
def window_votes(
    q: Float[Tensor, "b h w d"], k: Float[Tensor, "b g k d"], *, last: int, pool_tokens: int = 7,
    pooling: Literal["max", "avg"] = "max", group: Literal["mean", "max"] = "mean", scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b g k"]:  # fmt: skip
    """pool(sum over rows of softmax(scale q k^T)) of the keys before the window, which is the last w keys.

    Query heads of one key/value head agree by `group`. The window's own keys get no votes: the `last` of them are inf,
    those before -inf. As SnapKV's authors do, the mean pool counts the zeros beyond the ends.

    Raises:
        BadInput: an even pooling width, or more sure keys than the window has.
    """
    window = q.shape[2]
    if pool_tokens % 2 == 0 or not 0 <= last <= window:
        asked = f"votes of {window} queries, pool_tokens={pool_tokens}, last={last}"
        raise BadInput(asked, "a pool has a middle, and what is sure lies in the window", "Give such numbers.")
    ahead = column_scores(q, k, scale=scale, softcap=softcap)[..., :-window]
    if ahead.shape[-1]:
        pool = torch.nn.functional.max_pool1d if pooling == "max" else torch.nn.functional.avg_pool1d
        ahead = pool(ahead, pool_tokens, stride=1, padding=pool_tokens // 2)
    ahead = ahead.unflatten(1, (k.shape[1], -1))
    ahead = ahead.mean(2) if group == "mean" else ahead.amax(2)
    sure = torch.arange(window, device=q.device) >= window - last
    return torch.cat([ahead, torch.where(sure, torch.inf, -torch.inf).expand(*ahead.shape[:2], window)], -1)


def votes_of(
    seen: Seen, site: Site, *, pool_tokens: int, pooling: Literal["max", "avg"], group: Literal["mean", "max"]
) -> Float[Tensor, "b g k"]:
    """`window_votes` of what a method was shown. Within a budget below the window, older window keys rank like any
    losing key: the most recent ones stay."""
    assert seen.queries is not None, "the card asks for queries"
    last = min(seen.queries.shape[2], site.budget.tokens(site.seen, site.bytes_per_token))
    return window_votes(
        seen.queries, seen.keys, last=last, pool_tokens=pool_tokens, pooling=pooling, group=group, scale=site.scale,
        softcap=site.softcap,
    )  # fmt: skip


def check_window(name: str, window_tokens: int, pool_tokens: int) -> None:
    """That these options of a method can be used.

    Raises:
        BadOption: no voting query, or an even pooling width.
    """
    if window_tokens < 1:
        raise BadOption(f"{name}.window_tokens=0", "no query would vote", "Give at least 1, or leave it away.")
    if pool_tokens % 2 == 0:
        found = "an even pooling width has no middle"
        raise BadOption(f"{name}.pool_tokens={pool_tokens}", found, "Give an odd number; 1 pools nothing.")
