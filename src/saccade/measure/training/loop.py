"""One training, from its last checkpoint to its result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from saccade.core.errors import CannotRun
from saccade.core.method import Mixer
from saccade.measure.store import write_json
from saccade.measure.training import checkpoint, sharded
from saccade.measure.training.plan import Plan
from saccade.methods.nets import Spec
from saccade.tasks.training import Batch
from saccade.tasks.training._base import IGNORED

BETAS, WEIGHT_DECAY, LONGEST_GRADIENT = (0.9, 0.95), 0.1, 1.0
WARM_UP, LEAST = 0.1, 0.1  # share of the steps; of the learning rate, at the end
RESULT = "result.json"


@dataclass(frozen=True)
class Work:
    """One cell: a mixer from a seed, its folder, who shares the work, and whom to tell of every step."""

    plan: Plan
    label: str
    mixer: Spec
    seed: int
    folder: Path
    accelerator: Accelerator
    checkpoint_steps: int
    tell: Callable[[int, float], None]

    @property
    def mark(self) -> str:
        """What its checkpoint must bear."""
        return self.plan.mark(self.label, self.seed)


def finished(work: Work) -> dict[str, Any] | None:
    """The result, if it is there.

    Raises:
        CannotRun: it was made with other options.
    """
    file = work.folder / RESULT
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if found["mark"] != work.mark:
        raise CannotRun(f"use {file}", "it was made with other options", "Give the same, or another --out.")
    return found


def run(work: Work) -> dict[str, Any]:
    """Train to the end and judge; the result is on disk when this returns."""
    plan, accelerator = work.plan, work.accelerator
    net = plan.net(work.mixer, work.seed)
    optimiser = torch.optim.AdamW(_groups(net), lr=plan.learning_rate, betas=BETAS)
    state = checkpoint.load(work.folder, work.mark) or {"step": 0, "losses": [], "seconds": 0.0}
    if state["step"] and not accelerator.is_fsdp2:
        net.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    model, optimiser = accelerator.prepare(net, optimiser)
    if state["step"] and accelerator.is_fsdp2:
        sharded.restore(model, optimiser, state)
    began = time.perf_counter() - state["seconds"]
    losses: list[float] = list(state["losses"])
    for step in range(state["step"], plan.steps):
        losses.append(_step(work, model, optimiser, step))
        work.tell(step + 1, losses[-1])
        done = step + 1
        if done < plan.steps and done % work.checkpoint_steps == 0:
            _keep(work, net, optimiser, step=done, losses=losses, seconds=time.perf_counter() - began)
    spent = time.perf_counter() - began
    found = _judged(work, net) | {"losses": losses, "seconds": spent}
    if accelerator.is_main_process:
        work.folder.mkdir(parents=True, exist_ok=True)
        write_json(work.folder / RESULT, found)
        (work.folder / checkpoint.NAME).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return found


def _keep(work: Work, net: torch.nn.Module, optimiser: Any, **state: Any) -> None:
    """A checkpoint, by the first process; where weights lie in parts all of them have to give theirs."""
    if work.accelerator.is_fsdp2:
        state |= sharded.gather(net, optimiser)
    else:
        state |= {"model": net.state_dict(), "optimiser": optimiser.state_dict()}
    if work.accelerator.is_main_process:
        checkpoint.save(work.folder, work.mark, **state)


def _step(work: Work, model: torch.nn.Module, optimiser: Any, step: int) -> float:
    """One batch: every process takes its share of the rows, and the gradients are those of the whole."""
    plan, accelerator = work.plan, work.accelerator
    for group in optimiser.param_groups:
        group["lr"] = rate(plan, step)
    whole = plan.source().batch(step, plan.rows, work.seed)
    counted = int((whole.targets != IGNORED).sum())
    batch = _share(whole, accelerator)
    nats = torch.nn.functional.cross_entropy(_logits(model, batch), batch.targets.flatten(), reduction="sum")
    # averaged over the processes this is the mean over all targets, however they are spread over the rows
    accelerator.backward(nats * accelerator.num_processes / counted)
    accelerator.clip_grad_norm_(model.parameters(), LONGEST_GRADIENT)
    optimiser.step()
    optimiser.zero_grad()
    return _sum(accelerator, nats.detach()) / counted


def _judged(work: Work, net: torch.nn.Module) -> dict[str, Any]:
    """Score over what is held out, and what was computed for it."""
    plan, accelerator, task = work.plan, work.accelerator, work.plan.source()
    net.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for whole in task.held_out(plan.rows):
            batch = _share(whole, accelerator)
            if not len(batch.inputs) and accelerator.is_fsdp2:  # the others need the weights that are here
                _logits(net, whole.rows(slice(0, 1), accelerator.device))
            elif len(batch.inputs):
                score, counted = task.score(_logits(net, batch), batch.targets.flatten())
                total, count = total + score, count + counted
    sums = torch.tensor([total, count], dtype=torch.float64, device=accelerator.device)
    total, count = accelerator.reduce(sums, "sum").tolist()
    return {
        "mark": work.mark,
        "mixer": work.label,
        "seed": work.seed,
        "score": total / count,
        "density": density(net),
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def density(net: torch.nn.Module) -> float | None:
    """Share of the pairs that the layers computed in the newest forward; None where there are none that say it."""
    shares = [share for m in net.modules() if isinstance(m, Mixer) and (share := m.density()) is not None]
    return sum(shares) / len(shares) if shares else None


def rate(plan: Plan, step: int) -> float:
    """The learning rate of a step."""
    warm = max(1, int(WARM_UP * plan.steps))
    if step < warm:
        return plan.learning_rate * (step + 1) / warm
    along = (step - warm) / max(1, plan.steps - warm)
    return plan.learning_rate * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * along)) / 2)


def _logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """One row of logits for each target."""
    out = model(batch.inputs)
    return out[0].flatten(0, 1) if isinstance(out, tuple) else out


def _share(whole: Batch, accelerator: Accelerator) -> Batch:
    """The rows of this process."""
    return whole.rows(slice(accelerator.process_index, None, accelerator.num_processes), accelerator.device)


def _sum(accelerator: Accelerator, value: Tensor) -> float:
    return float(accelerator.reduce(value, "sum"))


def _groups(net: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices are drawn to zero; gains, biases and embeddings are not."""
    kept = {id(p) for m in net.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    drawn = [p for p in net.parameters() if p.dim() >= 2 and id(p) not in kept]
    rest = [p for p in net.parameters() if p.dim() < 2 or id(p) in kept]
    return [{"params": drawn, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
