"""The error rule of all numerical tests: at most twice the error of PyTorch's own kernel in that precision.

    assert_close_as_torch(out, q, k, v, mask)                  # forward of attention
    assert_no_worse(ours, exact, [theirs, ...])                # anything else: float64 truth, PyTorch's own results
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.attend import reference

TIMES = 2.0  # the one tolerance of this library


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite where one is NaN or an infinity and the other is not."""
    actual, exact = actual.detach().double(), exact.detach().double()
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} is not {tuple(exact.shape)}"
    difference = torch.where(actual == exact, 0.0, (actual - exact).abs()).nan_to_num(torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest value: what merely storing the truth in `dtype` can cost."""
    finite = exact[exact.isfinite()]
    return torch.finfo(dtype).eps / 2 * float(finite.abs().max()) if finite.numel() else 0.0


def assert_no_worse(actual: Tensor, exact: Tensor, yardsticks: Sequence[Tensor], what: str = "result") -> None:
    """The error of `actual` against float64 is at most twice the largest of PyTorch's own results (of its dtype).

    PyTorch's luck on tiny inputs does not count: its error is taken as no less than one rounding.
    """
    theirs = max([error(y.to(exact.device), exact) for y in yardsticks] + [rounding(exact, yardsticks[0].dtype)])
    ours = error(actual.to(exact.device), exact)
    assert ours <= TIMES * theirs, f"{what}: error {ours:.3g}, PyTorch's own {theirs:.3g}"


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp in float64. q [b h q d], k and v [b g k d], mask broadcast to [b h q k]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.masked(q.double(), k.double(), v.double(), mask, scale=scale, softcap=softcap)


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What PyTorch gives in the dtype of q: its SDPA where there is no softcap (else plain operations), and lse."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if softcap is None:
        mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = logits.softmax(-1) @ v
    if mask is not None:  # where a row sees nothing PyTorch gives NaN or zeros, as the kernel goes; we say zeros
        out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
    return out, logits.logsumexp(-1)


def assert_close_as_torch(
    actual: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    lse: Tensor | None = None,
) -> None:
    """`actual` (and `lse`) is attention over `mask`, at most twice as wrong as PyTorch's in the dtype of q."""
    options = {"scale": scale, "softcap": softcap}
    exact, exact_lse = exact_attention(q, k, v, mask, **options)
    theirs, their_lse = torch_attention(q, k, v, mask, **options)
    assert_no_worse(actual, exact, [theirs], "output")
    if lse is not None:
        assert_no_worse(lse, exact_lse, [their_lse], "lse")
