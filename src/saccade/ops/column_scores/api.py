"""How much attention a few queries pay to every key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.ops import device, dispatch
from saccade.ops.attend.api import check
from saccade.ops.column_scores import reference
from saccade.ops.column_scores import torch as tiled


@torch.no_grad()
def column_scores(
    q: Float[Tensor, "b h w d"],
    k: Float[Tensor, "b g k d"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    at: Int[Tensor, " w"] | None = None,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> Float[Tensor, "b h k"]:
    """sum over the rows of softmax(scale q k^T), float32 or better; with `causal` the queries are the last of the keys.

    For choosing keys: it has no gradient.

    at: the queries' own keys in place of the last ones, with `causal`; a query sees none behind its own
    impl: "auto", "torch" (two passes, never all logits), "reference", "triton" (CUDA, up to 128 queries; first there)
    report: is told which back end ran, as "column_scores:torch"

    Raises:
        BadInput: shapes or dtypes that do not fit together, no keys, more causal queries than keys, or places that are
            not one for each causal query.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, k, k)
    if not k.shape[2] or (causal and at is None and q.shape[2] > k.shape[2]):
        found = "causal queries are the last of the keys, and a row must see one"
        raise BadInput(f"column scores of {q.shape[2]} queries over {k.shape[2]} keys", found, "Give all keys.")
    if at is not None and (not causal or at.shape != q.shape[2:3]):
        found = f"{q.shape[2]} queries, {'causal' if causal else 'which see every key'}"
        asked = f"column scores of queries at {tuple(at.shape)} places"
        raise BadInput(asked, found, "Give each causal query its place.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"scale": scale, "softcap": softcap, "causal": causal, "at": at}
    name = dispatch.pick("column_scores", impl, back_ends(q, k), report)
    if name == "triton":
        from saccade.ops.column_scores import triton as kernels

        return kernels.column_scores(q, k, **options)
    return (reference if name == "reference" else tiled).column_scores(q, k, **options)


def back_ends(q: Tensor, k: Tensor) -> dict[str, Callable[[], dispatch.Reasons]]:
    """Back ends and why they cannot compute these, in the order "auto" tries."""

    def by_triton() -> list[str]:
        if not device.installed():
            return device.triton_reasons(q)
        from saccade.ops.column_scores import triton as kernels

        return kernels.reasons(q, k)

    return dispatch.with_triton(q, by_triton, {"torch": list, "reference": list})
