"""Which model is this? A hash of a few weights and all shapes, the same for every copy of a checkpoint."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch.distributed.tensor import DTensor


def fingerprint(model: Any) -> str:
    """Twelve hexadecimal digits; the same in float32 and bfloat16 copies of one checkpoint."""
    digest = hashlib.sha256()
    named = sorted(model.named_parameters())
    for name, weight in named:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
    for name, _ in (named[0], named[len(named) // 2], named[-1]):
        digest.update(_start(model, name).to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def _start(model: Any, name: str) -> torch.Tensor:
    """The first numbers of a weight wherever it lies: on disk, or in parts on several processes, which ask together."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):
        weight = getattr(module, own).detach()
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return whole.flatten()[:4096].clone()
