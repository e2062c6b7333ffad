"""Attention over a selection."""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.selection import Pairs, Selection, Together
from saccade.ops import dispatch
from saccade.ops.attend import flash4, flex, fused, reference
from saccade.ops.attend import torch as tiled
from saccade.ops.attend import triton as kernels
from saccade.ops.attend.tiles import axes
from saccade.ops.merge_lse.api import merge_lse

FEW_LOGITS = 1 << 24  # of all heads: up to here a GPU is faster with all pairs under a mask than with many small pieces


def attend(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    selection: Selection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """softmax over the selected pairs. Returns the output and the natural-log sum of exponentials of each row.

    out_i = sum_j exp(s_ij - lse_i) v_j,  lse_i = log sum_j exp(s_ij),  s = scale q k^T, over the pairs (i, j) of the
    selection; softcap: s = c tanh(s / c). A row that sees nothing gives zeros and -inf. Query heads share key/value
    heads in order (h / g each). Sums are in float32 or better; the output has the dtype of q, lse float32 or better.
    Differentiable in q, k and v, through both results.

    A `Together` is computed part by part, and merged; under one mask by "reference", and by "auto" where pairs are few
    on a CPU, if no part counts several times.

    impl: "auto" (kernels of our own where they can compute it, else "torch", or on a CUDA device "reference" where all
        pairs are few: it would wait for the host piece by piece), "triton" (those kernels: blocks, gather,
        lines, spans and buckets on a CUDA device), "torch", "reference" (dense under a mask, the oracle), "flex"
        (FlexAttention: blocks and spans on a CUDA device; never chosen by "auto", since it is compiled anew for shapes
        that it has not seen), "flash4" (the optional `flash-attn-4`: blocks of multiples of 128 and causal spans in
        16 bits on Hopper and Blackwell; has to be asked for)
    report: is told which back end ran, as "attend:torch"; of each part

    Raises:
        BadInput: shapes, dtypes or a selection that do not fit together.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, k, v)
    check_selection(q, k, selection)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(selection, Together):
        once = set(selection.times) == {1.0}
        if impl == "auto" and once and q.device.type == "cpu" and fused.few(q.shape[2], k.shape[2]):
            shape = {"queries": q.shape[2], "keys": k.shape[2], "causal": selection.causal}
            selection = Pairs(allowed=selection.mask(), **shape)
        elif impl != "reference" or not once:
            options = {"scale": scale, "softcap": softcap, "impl": impl, "report": report}
            every = [attend(q, k, v, part, **options) for part in selection.parts]
            return merge_lse([o for o, _ in every], [e + math.log(n) for (_, e), n in zip(every, selection.times)])
    name = dispatch.pick("attend", impl, back_ends(q, k, v, selection, scale, softcap), report)
    if name == "reference":
        return reference.masked(q, k, v, selection.mask(), scale=scale, softcap=softcap)
    back_end = {"torch": tiled, "flex": flex, "flash4": flash4, "triton": kernels}[name]
    return back_end.attend(q, k, v, selection, scale=scale, softcap=softcap)


def back_ends(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, softcap: float | None
) -> dict[str, Callable[[], dispatch.Reasons]]:
    """Back ends and why they cannot compute these, in the order "auto" tries."""
    few = q.is_cuda and math.prod(q.shape[:3]) * k.shape[2] <= FEW_LOGITS
    plain: dict[str, Callable[[], dispatch.Reasons]] = dict.fromkeys(
        ("reference", "torch") if few else ("torch", "reference"), list
    )
    plain["flex"] = lambda: flex.reasons(q, v, selection, softcap)
    plain["flash4"] = lambda: flash4.reasons(q, k, v, selection, scale)  # behind "torch": "auto" never comes to it
    return dispatch.with_triton(q, lambda: kernels.reasons(q, v, selection, scale), plain)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """That queries, keys and values fit together.

    Raises:
        BadInput: with the shapes or dtypes that do not.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise BadInput(f"attention of {shapes}", "they are not all [batch, heads, tokens, size]", "Reshape them.")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]):
        raise BadInput(
            f"attention of {shapes}",
            "batch, key/value heads, keys and the head size of q and k must agree",
            "Lay them out as [batch, heads, tokens, size].",
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise BadInput(
            f"attention of {q.shape[1]} query heads over {k.shape[1]} key/value heads",
            "the first is not a multiple of the second",
            "Give every key/value head the same number of query heads.",
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point or not q.device == k.device == v.device:
        found = ", ".join(f"{n} {x.dtype} on {x.device}" for n, x in (("q", q), ("k", k), ("v", v)))
        raise BadInput("attention", f"{found}: they must be of one floating dtype on one device", "Convert them.")


def check_selection(q: Tensor, k: Tensor, selection: Selection) -> None:
    """That a selection was made for these queries and keys.

    Raises:
        BadInput: with the sizes that differ.
    """
    asked = f"attention of {q.shape[2]} queries over {k.shape[2]} keys under a selection ({selection.kind})"
    if (selection.queries, selection.keys) != (q.shape[2], k.shape[2]):
        found = f"the selection is for {selection.queries} queries over {selection.keys} keys"
        raise BadInput(asked, found, "Make it for these tensors.")
    b, h = axes(selection)
    if b not in (1, q.shape[0]) or h not in (1, q.shape[1]):
        found = f"the selection has {b} sequences and {h} heads, the queries {q.shape[0]} and {q.shape[1]}"
        raise BadInput(asked, found, "Give each its own row, or one row for all.")
