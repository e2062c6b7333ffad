"""A few new queries over stored keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.selection import dense
from saccade.ops import device, dispatch
from saccade.ops.attend import reference
from saccade.ops.attend import triton as attending
from saccade.ops.attend.api import check
from saccade.ops.decode import torch as plain
from saccade.ops.merge_lse.api import merge_lse
from saccade.ops.quantise.api import Quantised, dequantise

Merged = tuple[Int[Tensor, "b g m"], Int[Tensor, "b g m"]]  # keys, and how many tokens each stands for


def decode(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"] | Quantised,
    v: Float[Tensor, "b g k dv"] | Quantised,
    index: Int[Tensor, "b h|g|1 q l"] | None = None,
    *,
    page_tokens: int = 1,
    visible: Bool[Tensor, "b h q k"] | None = None,
    merged: Merged | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> tuple[Float[Tensor, "b h q dv"], Float[Tensor, "b h q"]]:
    """The last `q` of `k` tokens read all keys before them, or just those in `index` (-1: none; each at most once).

    Causal among the queries themselves. Output and natural-log sum of exponentials as in `attend`; sizes of 1 in the
    batch and head axes of `index` and `visible` stand for all. An index with as many heads as there are key/value heads
    holds one list for all query heads of a group: its keys are then read once.

    k, v: both may be quantised to the same number of bits; plain back ends then spell them out, "triton" does not
    page_tokens: the index lists pages of so many keys instead: page p is the keys from p page_tokens on.
    visible: further narrows what each query sees.
    merged: keys that stand for several tokens: which, and for how many (1: like any other). Each counts so many times,
        as if log(tokens) were added to its logits. Not with an index, nor with quantised keys
    impl: "auto", "torch", "reference" (dense under a mask, the oracle), "triton" (CUDA; first there; where more queries
        than a tile takes read every key, as in a prompt, the kernels of `attend`)
    report: is told which back end ran, as "decode:torch"

    Raises:
        BadInput: shapes or dtypes that do not fit together, more queries than keys, or merged keys beside an
            index or quantised.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, *_stand_ins(q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    if queries > keys:
        raise BadInput(
            f"decode {queries} queries over {keys} keys",
            "the queries are the last of the keys",
            "Append their keys first.",
        )
    _check_rows("index", index, (*q.shape[:3], None), k.shape[1])
    _check_rows("visible", visible, (*q.shape[:3], keys))
    _check_merged(merged, index, k)
    if page_tokens < 1:
        raise BadInput(f"decode with page_tokens={page_tokens}", "a page has one key or more", "Give 1 or more.")
    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
    name = dispatch.pick("decode", impl, _back_ends(q, k, v, index, visible, options["scale"]), report)
    found = _by(name, q, k, v, index, visible, page_tokens=page_tokens, **options)
    if merged is None or isinstance(k, Quantised) or isinstance(v, Quantised):
        return found
    return merge_lse(*zip(found, plain.again(q, k, v, *merged, visible, **options)))


Stored = Tensor | Quantised


def _by(
    name: str, q: Tensor, k: Stored, v: Stored, index: Tensor | None, visible: Tensor | None, *, page_tokens: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """By the back end of that name."""
    if name == "triton":
        return _by_triton(q, k, v, index, visible, page_tokens=page_tokens, **options)
    k, v = (dequantise(x, q.dtype) if isinstance(x, Quantised) else x for x in (k, v))
    index = _token_lists(index, page_tokens, q.shape[1], k.shape[2])
    if name == "reference":
        mask = plain.selection(q.shape[2], k.shape[2], index, visible).mask()
        return reference.masked(q, k, v, mask, **options)
    return plain.decode(q, k, v, index, visible, **options)


def _stand_ins(q: Tensor, k: Stored, v: Stored) -> list[Tensor]:
    """Keys and values, or in place of quantised ones something of their shape."""
    if not isinstance(k, Quantised) and not isinstance(v, Quantised):
        return [k, v]
    if not isinstance(k, Quantised) or not isinstance(v, Quantised) or k.bits != v.bits:
        raise BadInput("decode", "keys and values are not quantised to the same number of bits", "Quantise both alike.")
    return [torch.empty(1, dtype=q.dtype, device=x.codes.device).expand(x.shape) for x in (k, v)]


def _is_prompt(q: Tensor, k: Stored, index: Tensor | None, visible: Tensor | None) -> bool:
    """Whether so many queries read every key before them that they are for the kernels of `attend`."""
    from saccade.ops.decode.triton import MOST_ROWS

    whole = index is None and visible is None and not isinstance(k, Quantised)
    return whole and q.shape[2] > 1 and q.shape[2] * (q.shape[1] // k.shape[1]) > MOST_ROWS


def _by_triton(q: Tensor, k: Stored, v: Stored, index: Tensor | None, visible: Tensor | None, **options: Any):
    if _is_prompt(q, k, index, visible):
        del options["page_tokens"]
        return attending.attend(q, k, v, dense(q.shape[2], k.shape[2]), **options)
    if isinstance(k, Quantised) and isinstance(v, Quantised):
        from saccade.ops.decode import quantised

        return quantised.decode(q, k, v, index, **options)
    from saccade.ops.decode import triton as kernels

    return kernels.decode(q, k, v, index, visible, **options)


def _back_ends(
    q: Tensor, k: Stored, v: Stored, index: Tensor | None, visible: Tensor | None, scale: float
) -> dict[str, Callable[[], dispatch.Reasons]]:
    def by_triton() -> list[str]:
        if not device.installed():
            return device.triton_reasons(q)
        if _is_prompt(q, k, index, visible):
            return attending.reasons(q, v, dense(q.shape[2], k.shape[2]), scale)
        from saccade.ops.decode import quantised
        from saccade.ops.decode import triton as kernels

        entries = 1 if index is None else index.shape[-1]
        why = kernels.reasons(q, *_stand_ins(q, k, v), listed=index is not None, entries=entries)
        if isinstance(k, Quantised) and isinstance(v, Quantised):
            why += quantised.reasons(q, k, v, visible)
        return why

    return dispatch.with_triton(q, by_triton, {"torch": list, "reference": list})


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


def _check_merged(merged: Merged | None, index: Tensor | None, k: Stored) -> None:
    if merged is None:
        return
    if index is not None or isinstance(k, Quantised):
        found = "merged keys are read with all others, and as they are"
        raise BadInput("decode", found, "Give no index, and keys that are not quantised.")
    shapes = [tuple(x.shape) for x in merged]
    if shapes[0] != shapes[1] or shapes[0][:-1] != tuple(k.shape[:2]):
        found = f"they do not both fit [{k.shape[0]}, {k.shape[1]}, any]"
        raise BadInput(f"decode with merged {shapes[0]} and {shapes[1]}", found, "Give each key/value head its row.")
