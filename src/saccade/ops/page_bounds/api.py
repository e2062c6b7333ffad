"""Pages of keys: the least and largest value of every channel, and how large a logit with a page can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.ops import device, dispatch
from saccade.ops.page_bounds import torch as plain


@torch.no_grad()
def page_bounds(
    k: Float[Tensor, "b g k d"], page_tokens: int, *, impl: str = "auto", report: dispatch.Report | None = None
) -> tuple[Float[Tensor, "b g p d"], Float[Tensor, "b g p d"]]:
    """Least and largest value of every channel over the keys of each page; the last page has the keys that are left.

    impl: "auto", "torch", "triton" (CUDA; first there)
    report: is told which back end ran, as "page_bounds:torch"

    Raises:
        BadInput: keys that are not [batch, heads, keys, size], or pages of no key.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    if k.dim() != 4 or not k.dtype.is_floating_point or page_tokens < 1:
        asked = f"page bounds of keys {tuple(k.shape)}, {k.dtype}, in pages of {page_tokens}"
        raise BadInput(asked, "it takes floats [batch, heads, keys, size] and pages of 1 key or more", "Give those.")
    if dispatch.pick("page_bounds", impl, _back_ends(k, k.shape[-1]), report) == "torch":
        return plain.page_bounds(k, page_tokens)
    from saccade.ops.page_bounds import triton as kernels

    return kernels.page_bounds(k, page_tokens)


@torch.no_grad()
def page_scores(
    q: Float[Tensor, "b h q d"],
    low: Float[Tensor, "b g p d"],
    high: Float[Tensor, "b g p d"],
    *,
    by_group: bool = False,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> Float[Tensor, "b h|g q p"]:
    """sum_d max(q_d low_d, q_d high_d): no key between the bounds of a page has a larger q.k. float32 or better.

    by_group: the largest over the query heads of each key/value head, so that they choose together
    impl: "auto", "torch", "triton" (CUDA; first there)
    report: is told which back end ran, as "page_scores:torch"

    Raises:
        BadInput: shapes or dtypes that do not fit together.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, low, high)
    if dispatch.pick("page_scores", impl, _back_ends(q, q.shape[-1]), report) == "torch":
        return plain.page_scores(q, low, high, by_group)
    from saccade.ops.page_bounds import triton as kernels

    return kernels.page_scores(q, low, high, by_group)


def check(q: Tensor, low: Tensor, high: Tensor) -> None:
    """That queries and bounds fit together.

    Raises:
        BadInput: with the shapes and dtypes that do not.
    """
    fits = q.dim() == low.dim() == 4 and low.shape == high.shape and q.shape[::3] == low.shape[::3]
    if not fits or not low.shape[1] or q.shape[1] % low.shape[1] or not q.dtype == low.dtype == high.dtype:
        found = f"low {tuple(low.shape)} {low.dtype}, high {tuple(high.shape)} {high.dtype}"
        asked = f"page scores of queries {tuple(q.shape)} {q.dtype}"
        raise BadInput(asked, found, "Give bounds of keys that fit the queries, in their dtype.")


def _back_ends(x: Tensor, size: int) -> dict[str, Callable[[], dispatch.Reasons]]:
    def by_triton() -> list[str]:
        why = device.triton_reasons(x.detach())
        if x.dtype == torch.float64:
            why.append("it computes in float32 at most, and the inputs are float64")
        if size > 256:
            why.append(f"heads of {size}; it takes up to 256")
        return why + ([] if x.numel() else ["there is nothing to read"])

    return dispatch.with_triton(x, by_triton, {"torch": list})
