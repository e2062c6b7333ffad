"""What a device offers to Triton kernels, and why it does not."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # of NVIDIA devices, at least


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported; CPU builds of torch come without it."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU: for tests."""
    if not installed() or os.environ.get("TRITON_INTERPRET", "0") == "0":
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def machine_reasons(x: Tensor) -> list[str]:
    """Why Triton kernels cannot run where x is; [] = they can. Where it is not installed, nothing else is said."""
    if not installed():
        return ["Triton is not installed: pip install triton"]
    if x.device.type != "cuda":
        why = f"Triton kernels run on a CUDA device, and the inputs are on the {x.device.type}"
        return [] if interpreted() else [why]
    if torch.version.hip:
        return ["it was tried on NVIDIA devices only, and this is an AMD one"]
    found, least = torch.cuda.get_device_capability(x.device), ".".join(map(str, CAPABILITY))
    return [] if found >= CAPABILITY else [f"compute capability {found[0]}.{found[1]}; it takes {least} or more"]


def within_reach(x: Tensor, of: Tensor) -> bool:
    """Whether a kernel where `of` is can read x: it lies there, or in pinned host memory."""
    return x.device == of.device or x.is_pinned()


def triton_reasons(*inputs: Tensor) -> list[str]:
    """The same, and that a kernel without a gradient is not asked for one."""
    why = machine_reasons(inputs[0])
    if not why and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        why = ["it gives no gradient, and an input asks for one: call it under torch.no_grad()"]
    return why


@functools.cache
def multiprocessors(index: int | None) -> int:
    """Of a CUDA device; where there is none (interpreter) a small number, so that tests split their work too."""
    if not torch.cuda.is_available():
        return 4
    return torch.cuda.get_device_properties(index if index is not None else 0).multi_processor_count


@functools.cache
def dependent_launch(index: int | None) -> bool:
    """Whether a kernel may start while the one before it ends (Hopper and later): saves a launch's latency."""
    if not torch.cuda.is_available() or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(index if index is not None else 0) >= (9, 0)
