"""A few new queries over stored keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.ops import device, dispatch
from saccade.ops.attend import reference
from saccade.ops.attend.api import check
from saccade.ops.decode import cudnn
from saccade.ops.decode import torch as plain


def decode(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k dv"],
    index: Int[Tensor, "b h|g|1 q l"] | None = None,
    *,
    page_tokens: int = 1,
    visible: Bool[Tensor, "b h q k"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """The last `q` of `k` tokens read all keys before them, or just those in `index` (-1: none; each at most once).

    Causal among the queries themselves. Output and natural-log sum of exponentials as in `attend`; sizes of 1 in the
    batch and head axes of `index` and `visible` stand for all. An index with as many heads as there are key/value heads
    holds one list for all query heads of a group: its keys are then read once.

    page_tokens: the index lists pages of so many keys instead: page p is the keys from p page_tokens on.
    visible: further narrows what each query sees.
    impl: "auto", "torch", "reference" (dense under a mask, the oracle), "triton" (CUDA: the first choice there),
        "cudnn" (CUDA, one query, no index, 16-bit; not chosen by "auto": see its module)
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
    _check_rows("index", index, (*q.shape[:3], None), k.shape[1])
    _check_rows("visible", visible, (*q.shape[:3], keys))
    if page_tokens < 1:
        raise BadInput(f"decode with page_tokens={page_tokens}", "a page has one key or more", "Give 1 or more.")
    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
    name = dispatch.pick("decode", impl, _back_ends(q, k, v, index, visible, page_tokens, softcap), report)
    if name == "cudnn":
        return cudnn.decode(q, k, v, scale=options["scale"])
    if name == "triton":
        from saccade.ops.decode import triton as kernels

        return kernels.decode(q, k, v, index, visible, page_tokens=page_tokens, **options)
    index = _token_lists(index, page_tokens, q.shape[1], keys)
    if name == "reference":
        return reference.masked(q, k, v, plain.selection(queries, keys, index, visible).mask(), **options)
    return plain.decode(q, k, v, index, visible, **options)


def _back_ends(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    visible: Tensor | None,
    page_tokens: int,
    softcap: float | None,
) -> dict[str, Callable[[], dispatch.Reasons]]:
    def by_triton() -> list[str]:
        if not device.installed():
            return device.triton_reasons(q)
        from saccade.ops.decode import triton as kernels

        return kernels.reasons(q, k, v, index, visible, page_tokens)

    there = {"torch": list, "reference": list, "triton": by_triton}
    there["cudnn"] = lambda: cudnn.reasons(q, k, v, index, visible, softcap)
    if device.triton_first(q):
        there = {"triton": by_triton, **there}
    return there


def _token_lists(index: Tensor | None, page_tokens: int, heads: int, keys: int) -> Tensor | None:
    """One list of keys for each query head, or for all."""
    if index is None:
        return None
    if page_tokens > 1:
        token = index.long()[..., None] * page_tokens + torch.arange(page_tokens, device=index.device)
        index = token.masked_fill((index < 0)[..., None] | (token >= keys), -1).flatten(-2).int()
    return index if index.shape[1] in (1, heads) else index.repeat_interleave(heads // index.shape[1], 1)


def _check_rows(name: str, x: Tensor | None, shape: tuple[int | None, ...], groups: int | None = None) -> None:
    if x is None:
        return
    fits = x.dim() == 4 and x.shape[0] in (1, shape[0]) and x.shape[1] in (1, shape[1], groups)
    if not fits or x.shape[2] != shape[2] or shape[3] not in (None, x.shape[3]):
        want = ", ".join("any" if n is None else str(n) for n in shape)
        raise BadInput(f"decode with {name} {tuple(x.shape)}", f"it does not fit [{want}]", "Give each query its row.")
