"""How much attention blocks of queries pay to blocks of keys, from one logit for every `stride` x `stride` pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.ops import device, dispatch
from saccade.ops.antidiagonal_mass import reference
from saccade.ops.antidiagonal_mass import torch as tiled
from saccade.ops.attend.api import check


@torch.no_grad()
def antidiagonal_mass(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    *,
    block: int,
    stride: int,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    report: dispatch.Report | None = None,
) -> Float[Tensor, "b h nqb nkb"]:
    """Shares of a softmax over groups of `stride` keys, averaged over the groups of `stride` queries of a block.

    A pair of groups has the mean logit of its antidiagonal,  s_tu = scale / stride sum_i q_{t, stride-1-i} . k_{u, i},
    which meets each of its columns and every other of its diagonals (of an even stride those at odd distances). Tokens
    that a last group lacks count as zeros. A group of queries sees the groups of keys that begin before it ends.
    Queries are the last of the keys; groups and blocks are counted from the first query and the first key. Float32 or
    better; for choosing blocks: it has no gradient.

    impl: "auto", "torch" (some rows of blocks at a time), "reference" (by all pairs, the oracle), "triton" (CUDA;
        16-bit inputs, blocks of a power of two of strides up to 128)
    report: is told which back end ran, as "antidiagonal_mass:torch"

    Raises:
        BadInput: queries and keys that do not fit together, more queries than keys, or a block that is not whole
            strides.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    check(q, k, k)
    if stride < 1 or block < 1 or block % stride or q.shape[2] > k.shape[2]:
        asked = f"antidiagonals of {q.shape[2]} queries over {k.shape[2]} keys, block={block}, stride={stride}"
        raise BadInput(asked, "a block is whole strides, and queries are the last of the keys", "Give such numbers.")
    options = {"block": block, "stride": stride, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
    name = dispatch.pick("antidiagonal_mass", impl, back_ends(q, k, block, stride), report)
    if name == "triton":
        from saccade.ops.antidiagonal_mass import triton as kernels

        return kernels.antidiagonal_mass(q, k, softcap=softcap, **options)
    return (reference if name == "reference" else tiled).antidiagonal_mass(q, k, softcap=softcap, **options)


def back_ends(q: Tensor, k: Tensor, block: int, stride: int) -> dict[str, Callable[[], dispatch.Reasons]]:
    """Back ends and why they cannot compute these, in the order "auto" tries."""

    def by_triton() -> list[str]:
        if not device.installed():
            return device.triton_reasons(q)
        from saccade.ops.antidiagonal_mass import triton as kernels

        return kernels.reasons(q, k, block, stride)

    return dispatch.with_triton(q, by_triton, {"torch": list, "reference": list})
