"""What a training of a method's own weights goes on from when it was interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SAVED_EVERY = 50  # steps


def state(losses: Sequence[float], weights: Mapping[str, Tensor], optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """All that training goes on from."""
    moments = {f"{name}.{what}": x for name, p in weights.items() for what, x in optimiser.state[p].items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | {n: x.detach() for n, x in weights.items()} | moments


def resume(
    saved: Mapping[str, Tensor] | None, weights: Mapping[str, Tensor], optimiser: torch.optim.AdamW
) -> list[float]:
    """Put it back; returns the losses so far."""
    if saved is None:
        return []
    for name, p in weights.items():
        p.data.copy_(saved[name])
        moments = {key.removeprefix(f"{name}."): x for key, x in saved.items() if key.startswith(f"{name}.")}
        optimiser.state[p] = {what: x.to("cpu" if what == "step" else p.device) for what, x in moments.items()}
    return saved["losses"].tolist()
