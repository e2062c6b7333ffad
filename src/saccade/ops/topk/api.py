"""The places of the best scores, in ascending order: what a list of keys or pages is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadInput
from saccade.core.selection import column
from saccade.ops import device, dispatch
from saccade.ops.topk import torch as plain

LONG = 16384  # scores of a row that Triton reads with one program; longer ones it shares among many, within limits:
MOST = 12288  # places that are kept, since what is chosen from at last stays in registers
ROWS = 2048  # rows, since what is left of each is stored


@torch.no_grad()
def topk(
    scores: Float[Tensor, "*rows n"], keep: int, *, impl: str = "auto", report: dispatch.Report | None = None
) -> Int[Tensor, "*rows k"]:
    """Where the `keep` largest scores of each row are (all of them, if there are fewer), ascending, int32.

    -inf is never chosen: -1 stands at the end of a row that has fewer others. NaN counts as the largest. Of equal
    scores at the edge the first are taken ("torch": any).

    impl: "auto", "torch", "reference" (a stable sort, the oracle), "triton" (CUDA, first there; of rows longer than
        16,384 it takes 2,048 at most, and keeps 12,288 at most)
    report: is told which back end ran, as "topk:torch"

    Raises:
        BadInput: nothing to choose from, or nothing to keep.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    if not scores.dim() or not scores.shape[-1] or keep < 1 or not scores.dtype.is_floating_point:
        asked = f"the {keep} largest of scores {tuple(scores.shape)} {scores.dtype}"
        raise BadInput(asked, "it takes rows of one float or more, and keeps one or more", "Give those.")
    keep = min(keep, scores.shape[-1])
    name = dispatch.pick("topk", impl, _back_ends(scores, keep), report)
    if name == "triton":
        from saccade.ops.topk import triton as kernels

        return kernels.topk(scores, keep)
    return plain.topk(scores, keep) if name == "torch" else plain.stable(scores, keep)


@torch.no_grad()
def topk_rows(scores: Float[Tensor, "*heads q n"], counts: Sequence[int]) -> Int[Tensor, "*heads q k"]:
    """Where the counts[i] largest scores of query i are, int32, and -1 behind them: of a single query as `topk` gives
    them, of several the largest first."""
    if scores.shape[-2] == 1:
        return topk(scores, counts[0])
    index = scores.topk(max(counts), -1).indices
    spare = torch.arange(max(counts), device=scores.device) >= column(counts, scores.device)
    return index.masked_fill(spare, -1).int()


def _back_ends(scores: Tensor, keep: int) -> dict[str, Callable[[], dispatch.Reasons]]:
    def by_triton() -> list[str]:
        why = device.triton_reasons(scores.detach())
        if scores.dtype == torch.float64:
            why.append("it compares in float32, and the scores are float64")
        why += long_reasons(scores.numel() // scores.shape[-1], scores.shape[-1], keep)
        return why + ([] if scores.numel() else ["there is nothing to read"])

    return dispatch.with_triton(scores, by_triton, {"torch": list, "reference": list})


def long_reasons(rows: int, n: int, keep: int) -> list[str]:
    """Why Triton cannot choose among so many scores of so many rows; [] if it can."""
    if n <= LONG:
        return []
    long = f"of rows longer than {LONG}, and these have {n}"
    why = [f"it takes up to {ROWS} {long} and are {rows}"] if rows > ROWS else []
    return why + ([f"it keeps up to {MOST} {long} and keep {keep}"] if keep > MOST else [])
