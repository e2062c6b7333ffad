"""Which back end computes a call of an op, and how the caller learns of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from saccade.core.errors import BadOption, CannotRun

Report = Callable[[str], None]
Reasons = Sequence[str]


def with_triton(
    x: Tensor, triton: Callable[[], Reasons], plain: Mapping[str, Callable[[], Reasons]]
) -> dict[str, Callable[[], Reasons]]:
    """Back ends in the order "auto" tries: our Triton kernels first where x is on a CUDA device, else last."""
    return {"triton": triton, **plain} if x.is_cuda else {**plain, "triton": triton}


def pick(op: str, impl: str, reasons: Mapping[str, Callable[[], Reasons]], report: Report | None = None) -> str:
    """The back end for this call: the one asked for, or with "auto" the first that can.

    reasons: back end -> why it cannot compute this call ([] = it can), in the order "auto" tries.
    report: is told "op:back end".

    Raises:
        BadOption: no back end of that name.
        CannotRun: the one asked for cannot, with every reason.
    """
    if impl == "auto":
        impl = next(name for name, why in reasons.items() if not why())
    elif impl not in reasons:
        raise BadOption(f"{op} with impl={impl!r}", "there is no such back end", f"It has: auto, {', '.join(reasons)}.")
    elif why := reasons[impl]():
        raise CannotRun(f"{op} with impl={impl!r}", why, "Use impl='auto', which takes a back end that can.")
    if report is not None:
        report(f"{op}:{impl}")
    return impl
