"""Which back end computes a call of an op, and how the caller learns of it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from saccade.core.errors import BadOption, CannotRun

Report = Callable[[str], None]
Reasons = Sequence[str]
_asking: contextvars.ContextVar[bool] = contextvars.ContextVar("asking", default=False)


class _Told(Exception):
    """Carries the back ends of a call out of it, before anything is computed."""

    def __init__(self, back_ends: dict[str, list[str]]):
        self.back_ends = back_ends


def explain(call: Callable[[], object]) -> dict[str, list[str]]:
    """The back ends of a call of an op, in the order "auto" tries, each with why it cannot compute it ([] = it can).

        ops.explain(lambda: ops.attend(q, k, v, selection))     # {"torch": [], "triton": ["Triton is not installed"]}

    Nothing is computed. {} where the call asks no op, or one that has a single way.
    """
    token = _asking.set(True)
    try:
        call()
    except _Told as told:
        return told.back_ends
    finally:
        _asking.reset(token)
    return {}


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
    if _asking.get():
        raise _Told({name: list(why()) for name, why in reasons.items()})
    if impl == "auto":
        impl = next(name for name, why in reasons.items() if not why())
    elif impl not in reasons:
        raise BadOption(f"{op} with impl={impl!r}", "there is no such back end", f"It has: auto, {', '.join(reasons)}.")
    elif why := reasons[impl]():
        raise CannotRun(f"{op} with impl={impl!r}", why, "Use impl='auto', which takes a back end that can.")
    if report is not None:
        report(f"{op}:{impl}")
    return impl
