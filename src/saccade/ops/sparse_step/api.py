"""One whole step of sparse decoding: score pages, choose the best, attend to their tokens."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.ops import device, dispatch
from saccade.ops.attend import api as attend
from saccade.ops.decode.api import decode
from saccade.ops.page_bounds.api import check, page_scores
from saccade.ops.topk.api import long_reasons, topk


def sparse_step(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    low: Float[Tensor, "b g p d"],
    high: Float[Tensor, "b g p d"],
    *,
    page_tokens: int,
    keep_pages: int,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """The query heads of a key/value head read the `keep_pages` pages whose largest possible logit with any of them is
    largest, exactly; pages and bounds as `page_bounds` makes them. Output and natural-log sum of exponentials.

    A page that a query cannot see yet is chosen like any other, and adds nothing: the first of several queries may
    read fewer. Nothing here waits for a CUDA device, so a step can be captured in a CUDA graph.

    impl: "auto", "torch", "triton" (CUDA; first there)
    report: is told which back end ran, as "sparse_step:torch"

    Raises:
        BadInput: shapes or dtypes that do not fit together.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, low, high)
    attend.check(q, k, v)
    pages = -(-k.shape[2] // page_tokens) if page_tokens > 0 else 0
    if low.shape[:3] != (*k.shape[:2], pages) or keep_pages < 1:
        asked = f"a step that keeps {keep_pages} pages of {page_tokens} of keys {tuple(k.shape)}"
        raise BadInput(asked, f"the bounds are {tuple(low.shape)}", "Give page_bounds(k, page_tokens), and keep some.")
    options = {"page_tokens": page_tokens, "scale": q.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
    if dispatch.pick("sparse_step", impl, _back_ends(q, k, v, pages, keep_pages), report) == "triton":
        from saccade.ops.sparse_step import triton as kernels

        return kernels.step(q, k, v, low, high, keep_pages=min(keep_pages, pages), **options)
    index = topk(page_scores(q, low, high, by_group=True, impl="torch"), keep_pages, impl="torch")
    return decode(q, k, v, index, impl="torch", **options)


def _back_ends(
    q: Tensor, k: Tensor, v: Tensor, pages: int, keep_pages: int
) -> dict[str, Callable[[], dispatch.Reasons]]:
    def by_triton() -> list[str]:
        if not device.installed():
            return device.triton_reasons(q)
        from saccade.ops.decode import triton as kernels

        why = long_reasons(k.shape[0] * k.shape[1] * q.shape[2], pages, min(keep_pages, pages))
        return kernels.reasons(q, k, v, listed=True) + why

    return dispatch.with_triton(q, by_triton, {"torch": list})
