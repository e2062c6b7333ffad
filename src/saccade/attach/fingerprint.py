"""Which model is this? A hash of a few weights and all shapes, the same for every copy of a checkpoint."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def fingerprint(model: Any) -> str:
    """Twelve hexadecimal digits; the same in float32 and bfloat16 copies of one checkpoint."""
    digest = hashlib.sha256()
    named = sorted(model.named_parameters())
    for name, weight in named:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
    for _, weight in (named[0], named[len(named) // 2], named[-1]):
        some = _whole(weight.detach()).flatten()[:4096].to("cpu", torch.bfloat16).contiguous()
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def _whole(weight: Any) -> torch.Tensor:
    """Of a weight that lies in parts on several processes, all of it: they ask together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
