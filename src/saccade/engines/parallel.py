"""Several processes for one text: `with parallel.sequence(): with saccade.attach(...): ...`.

Every process of a torchrun runs the same program on the same tokens; the model works on a share of them in each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist

from saccade.attach.sequence import SHARING, Sharing
from saccade.core.errors import BadOption, CannotRun


@contextlib.contextmanager
def sequence(how: Literal["heads", "ring"] = "heads", group: Any = None) -> Iterator[None]:
    """What is attached in here shares each text among the processes of a group.

    how: "heads": in attention each process has all tokens of its part of the heads; any method, caches and `generate`.
        "ring": keys and values go round, and each process has its tokens of all heads; methods by position, no cache
    group: of torch.distributed; None: all processes

    `model(ids)` returns the whole text's logits everywhere. With `labels` it returns those of the tokens here, and the
    whole text's loss; gradients, averaged over the processes as `DistributedDataParallel` and FSDP do, or by
    `average_gradients`, are those of the whole.

    Raises:
        CannotRun: torch.distributed was not set up. BadOption: another way of sharing.
    """
    if how not in ("heads", "ring"):
        raise BadOption(f"sequence({how!r})", "a text is shared by 'heads' or in a 'ring'", "Say one of them.")
    if not dist.is_initialized():
        found = "there is no group of processes"
        raise CannotRun("share a text", found, "Start with torchrun, and call torch.distributed.init_process_group().")
    token = SHARING.set(Sharing(how, group))
    try:
        yield
    finally:
        SHARING.reset(token)


def average_gradients(model: torch.nn.Module, group: Any = None) -> None:
    """Give every process the mean of all gradients: what `DistributedDataParallel` does by itself."""
    ranks = dist.get_world_size(group)
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= ranks
