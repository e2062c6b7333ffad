"""A few new queries over stored keys."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.ops import dispatch
from saccade.ops.attend import reference
from saccade.ops.attend.api import check
from saccade.ops.decode import torch as plain


def decode(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    index: Int[Tensor, "b h q l"] | None = None,
    *,
    visible: Bool[Tensor, "b h q k"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """The last `q` of `k` tokens read all keys before them, or just those in `index` (-1: none; each at most once).

    Causal among the queries themselves. Output and natural-log sum of exponentials as in `attend`; sizes of 1 in the
    batch and head axes of `index` and `visible` stand for all.

    visible: further narrows what each query sees.
    impl: "auto", "torch", "reference" (dense under a mask, the oracle), "triton"
    report: is told which back end ran, as "decode:torch"

    Raises:
        BadInput: shapes or dtypes that do not fit together, or more queries than keys.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, k, v)
    queries, keys = q.shape[2], k.shape[2]
    if queries > keys:
        raise BadInput(
            f"decode {queries} queries over {keys} keys",
            "the queries are the last of the keys",
            "Append their keys first.",
        )
    _check_rows("index", index, (*q.shape[:3], None))
    _check_rows("visible", visible, (*q.shape[:3], keys))
    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
    back_ends = {"torch": list, "reference": list, "triton": lambda: dispatch.NO_TRITON}
    if dispatch.pick("decode", impl, back_ends, report) == "reference":
        return reference.masked(q, k, v, plain.selection(queries, keys, index, visible).mask(), **options)
    return plain.decode(q, k, v, index, visible, **options)


def _check_rows(name: str, x: Tensor | None, shape: tuple[int | None, ...]) -> None:
    if x is None:
        return
    fits = x.dim() == 4 and all(s in (1, n) for s, n in zip(x.shape[:2], shape)) and x.shape[2] == shape[2]
    if not fits or shape[3] not in (None, x.shape[3]):
        want = ", ".join("any" if n is None else str(n) for n in shape)
        raise BadInput(f"decode with {name} {tuple(x.shape)}", f"it does not fit [{want}]", "Give each query its row.")
