"""Several mixers, several seeds, one table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from saccade.core.budget import Budget
from saccade.core.errors import BadOption
from saccade.measure.environment import environment
from saccade.measure.stats import mean_interval, paired
from saccade.measure.store import write_json
from saccade.measure.training import sharded
from saccade.measure.training.loop import Work
from saccade.measure.training.orderings import figures, orderings
from saccade.measure.training.plan import Plan, cell_folder, contestants, labels
from saccade.measure.training.turns import Turns
from saccade.methods.nets import Spec
from saccade.tasks.training import TrainingTask
from saccade.tasks.training._base import Progress

SUMMARY = "summary.json"
LAST = 0.1  # of the steps, over which the training loss is averaged
POLL_SECONDS = 0.5


def train(
    task: str,
    mixers: Sequence[str] | Mapping[str, Spec],
    out: str | Path,
    *,
    against: Sequence[str] = (),
    budget: float | str | Budget = 0.25,
    seeds: int = 5,
    steps: int | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    channels: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    learning_rate: float | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    checkpoint_steps: int = 100,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Train every mixer from every seed, `full` and `random` among them, and return what `summary.json` then holds.

    mixers: names as `make_mixer` takes them, or label -> mixer for layers of your own
    against: baselines, names or labels: whether each mixer is better than each of them stands in `orderings`
    budget: of the methods that select, `random` included; seeds: 0, 1, ... so many
    out: the folder. What is finished there is not trained again, and what was broken off goes on from its checkpoint,
        which is written every `checkpoint_steps` steps
    Other values are the task's own where they are None. Under `accelerate launch` every process calls this. Processes
    that were started each by itself and have one folder train what none of the others does, and wait for the rest.

    Raises:
        UnknownName: no such task or mixer. BadOption: a number that cannot be used. CannotRun: a mixer that cannot be
        trained so, or a folder that holds something else. ModelUnavailable: data that cannot be had.
    """
    sizes = {"rows": rows, "steps": steps, "channels": channels, "layers": layers, "heads": heads}
    plan = Plan.of(task, budget, tokens, dtype, learning_rate=learning_rate, **sizes)
    accelerator = sharded.accelerator(device)
    given = mixers if isinstance(mixers, Mapping) else ()
    asked, others = labels(mixers, given), labels(against, given)
    _check(plan, accelerator, seeds, checkpoint_steps)
    _check_orderings(asked, others)
    who = contestants(mixers, against)
    for mixer in who.values():
        plan.net(mixer, 0)  # a mixer that cannot be trained is said before the first one is
    _prepare(plan.source(), accelerator, progress)
    told = _Told(len(who) * seeds, plan.steps, progress if accelerator.is_main_process else _silent)
    cells = [
        Work(plan, label, mixer, seed, cell_folder(out, label, seed), accelerator, checkpoint_steps, _untold)
        for seed in range(seeds)
        for label, mixer in who.items()
    ]
    summary = summarise(plan, _trained(cells, told))
    ordered = list(orderings(summary["mixers"], asked, others, summary["higher_is_better"]))
    summary |= {"orderings": ordered, "processes": accelerator.num_processes, "environment": environment(device)}
    if accelerator.is_main_process:
        write_json(Path(out) / SUMMARY, summary)
    return summary


def _trained(cells: Sequence[Work], told: _Told) -> list[dict[str, Any]]:
    """All results, in the order of the cells; those that other processes work on come last."""
    found: dict[str, dict[str, Any]] = {}
    with Turns() as turns:
        while len(found) < len(cells):
            before = len(found)
            for work in cells:
                if work.mark not in found and (done := turns.take(told.cell(work))):
                    found[work.mark] = done
                    told.over()
            if len(found) == before:
                time.sleep(POLL_SECONDS)
    return [found[work.mark] for work in cells]


def _check(plan: Plan, accelerator: Accelerator, seeds: int, checkpoint_steps: int) -> None:
    for name, value in (("seeds", seeds), ("checkpoint_steps", checkpoint_steps)):
        if value < 1:
            raise BadOption(f"{name}={value}", "it must be 1 or more", "Give such a number.")
    if plan.rows % accelerator.num_processes:
        asked = f"{plan.rows} rows over {accelerator.num_processes} processes"
        raise BadOption(asked, "they cannot be shared out evenly", "Give --rows a multiple of the processes.")


def _check_orderings(mixers: Sequence[str], against: Sequence[str]) -> None:
    if against and not set(mixers) - set(against):
        asked = f"judge {', '.join(mixers) or 'nothing'} against {', '.join(against)}"
        raise BadOption(asked, "there is no other mixer to be judged", "Give --mixer one that is not among these.")


def _prepare(task: TrainingTask, accelerator: Accelerator, progress: Progress) -> None:
    """The first process fetches, the others wait and then find it there."""
    with accelerator.main_process_first():
        task.prepare(progress if accelerator.is_main_process else _silent)


def _silent(done: int, total: int, text: str) -> None:
    """What other processes than the first say."""


def _untold(step: int, loss: float) -> None:
    """Steps of a cell before its turn, which there are none of."""


class _Told:
    """Progress over all cells, with the time that is left at the speed so far; what was finished before costs none."""

    def __init__(self, cells: int, steps: int, progress: Progress):
        self.steps, self.progress, self.total = steps, progress, cells * steps
        self.before, self.trained, self.began = 0, 0, time.perf_counter()

    def over(self) -> None:
        """One more cell is finished."""
        self.before += self.steps

    def cell(self, work: Work) -> Work:
        """The same, and every step of it is told."""
        title = f"{work.label}, seed {work.seed}"

        def tell(step: int, loss: float) -> None:
            self.trained += 1
            done = self.before + step
            left = (time.perf_counter() - self.began) / self.trained * (self.total - done)
            self.progress(done, self.total, f"{title}, step {step}: loss {loss:.3f}, {left:.0f} s left")

        return dataclasses.replace(work, tell=tell)


# --- the table --------------------------------------------------------------------------------------------------------


def summarise(plan: Plan, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line per mixer: its score over the seeds, and its difference from `full`, seed by seed, with intervals."""
    task = plan.source()
    by_mixer: dict[str, list[Mapping[str, Any]]] = {}
    for cell in found:
        by_mixer.setdefault(cell["mixer"], []).append(cell)
    base = [cell["score"] for cell in by_mixer["full"]]
    lines = [_line(label, cells, base) for label, cells in by_mixer.items()]
    about = {"metric": task.metric, "higher_is_better": task.metric == "accuracy"}
    return {"plan": dataclasses.asdict(plan)} | about | {"mixers": lines}


def _line(label: str, cells: Sequence[Mapping[str, Any]], base: Sequence[float]) -> dict[str, Any]:
    scores = [cell["score"] for cell in cells]
    less = None if label == "full" else figures(paired(scores, base, hits=False))
    return {
        "mixer": label,
        "seeds": len(cells),
        "scores": scores,
        "score": figures(mean_interval(scores)),
        "minus_full": less,
        "train_loss": _mean([_end(cell["losses"]) for cell in cells]),
        "density": None if cells[0]["density"] is None else _mean([cell["density"] for cell in cells]),
        "parameters": cells[0]["parameters"],
        "seconds": _mean([cell["seconds"] for cell in cells]),
    }


def _end(losses: Sequence[float]) -> float:
    return _mean(losses[-max(1, int(LAST * len(losses))) :])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
