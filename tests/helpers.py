"""The error rule of all numerical tests: at most twice the error of PyTorch's own kernel in that precision.

    assert_close_as_torch(out, q, k, v, mask)                  # forward of attention
    assert_no_worse(ours, exact, [theirs, ...])                # anything else: float64 truth, PyTorch's own results
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.ops.attend import reference

TIMES = 2.0  # the one tolerance of this library
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)  # PyTorch's own on every device
TURNS = (0, 5, 11)


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
    theirs = max([error(y, exact) for y in yardsticks] + [rounding(exact, yardsticks[0].dtype)])
    assert_within(actual, exact, theirs, what)


def assert_within(actual: Tensor, exact: Tensor, theirs: float, what: str = "result") -> None:
    """The error of `actual` is at most twice `theirs`, an error of PyTorch's."""
    ours = error(actual, exact)
    assert ours <= TIMES * theirs, f"{what}: error {ours:.3g}, PyTorch's own {theirs:.3g}"


def assert_within_largest(ours: dict[str, Tensor], exact: Iterable[Tensor], bounds: Iterable[Sequence[float]]) -> None:
    """As `assert_within`, of several results at once: each bound is a list of one for each of them, the largest count,
    and no more are computed than it takes."""
    errors = {name: error(x, e) for (name, x), e in zip(ours.items(), exact)}
    theirs = dict.fromkeys(errors, 0.0)
    for bound in bounds:
        theirs = {name: max(t, b) for (name, t), b in zip(theirs.items(), bound)}
        if all(errors[name] <= TIMES * theirs[name] for name in errors):
            return
    for name, worst in errors.items():
        assert worst <= TIMES * theirs[name], f"{name}: error {worst:.3g}, PyTorch's own {theirs[name]:.3g}"


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
    backend: SDPBackend = SDPBackend.FLASH_ATTENTION,
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
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = logits.softmax(-1) @ v
    if mask is not None:  # where a row sees nothing PyTorch gives NaN or zeros, as the kernel goes; we say zeros
        out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
    return out, logits.logsumexp(-1)


def torch_attempts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: float | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same by each of PyTorch's kernels, head axis and keys turned: equal but for rounding, so less luck."""
    for backend in KERNELS:
        for turn in TURNS:
            turned = q.roll(turn, -1), k.roll((turn, turn), (-2, -1)), v.roll(turn, -2)
            yield torch_attention(*turned, None if mask is None else _turned(mask, turn), **options, backend=backend)


def _turned(mask: Tensor, turn: int) -> Tensor:
    return mask if mask.shape[-1] == 1 else mask.roll(turn, -1)


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
    also: Iterable[tuple[Tensor, Tensor]] = (),
) -> None:
    """`actual` (and `lse`) is attention over `mask`, at most twice as wrong as PyTorch's in the dtype of q.

    PyTorch's error is the largest of its kernels on these tensors, under the mask and without, and of `also`: other
    ways to compute the same by PyTorch's operations.
    """
    options = {"scale": scale, "softcap": softcap}
    exact = exact_attention(q, k, v, mask, **options)

    def bounds() -> Iterator[list[float]]:
        yield [rounding(e, q.dtype) for e in exact]
        for seen in (None,) if mask is None else (mask, None):
            truth = exact if seen is mask else exact_attention(q, k, v, seen, **options)
            for attempt in torch_attempts(q, k, v, seen, **options):
                yield [error(x, e) for x, e in zip(attempt, truth)]
        for attempt in also:
            yield [error(x, e) for x, e in zip(attempt, exact)]

    ours = {"output": actual} if lse is None else {"output": actual, "lse": lse}
    assert_within_largest(ours, exact, bounds())
