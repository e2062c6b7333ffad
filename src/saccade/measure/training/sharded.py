"""Weights, gradients and optimiser states in parts on several processes: FSDP, as `accelerate` is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from saccade.core.errors import CannotRun


def accelerator(device: str) -> Accelerator:
    """Who shares the work. FSDP is used where `accelerate` was told to, over gloo too, where it would leave it out.

    Raises:
        CannotRun: the older FSDP, whose flat weights would be drawn to zero alike; or FSDP in one process.
    """
    made = Accelerator(cpu=device == "cpu")
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return made
    if made.num_processes == 1:
        do = "Start several: accelerate launch --num_processes 2, without its --cpu."
        raise CannotRun("train with FSDP", "this is one process", do)
    plugin = getattr(made.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        found = "it is FSDP 1, whose flat weights hide which of them are drawn to zero"
        raise CannotRun("train with FSDP", found, "Say fsdp_version: 2 in accelerate's configuration.")
    made.state.fsdp_plugin = plugin
    for state in (PartialState(), made.state):  # the second is brought in line with the first again and again
        state.distributed_type = DistributedType.FSDP
    return made


def gather(model: torch.nn.Module, optimiser: Any) -> dict[str, Any]:
    """All weights and states, whole, in the first process; every process calls it."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, optimiser.optimizer, options=whole)
    return {"model": weights, "optimiser": states}


def restore(model: torch.nn.Module, optimiser: Any, state: Mapping[str, Any]) -> None:
    """What `gather` gave, read by every process: each takes its parts."""
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimiser"]}
    set_state_dict(model, optimiser.optimizer, options=StateDictOptions(full_state_dict=True), **parts)
