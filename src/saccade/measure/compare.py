"""Many methods x budgets x tasks against `full`, with what it costs in quality, time and bytes: one run directory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade import models
from saccade import tasks as all_tasks
from saccade.attach import fingerprint
from saccade.core.budget import FULL as WHOLE
from saccade.core.budget import Budget
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.measure.cells import FULL, SCHEMA, Cell
from saccade.measure.config import BUDGETS, Config
from saccade.measure.contestants import Contestant, Spec
from saccade.measure.environment import digest, environment
from saccade.measure.planning import Plan, estimate, weigh
from saccade.measure.runner import Event, Progress, Results, run_cells, write_json
from saccade.measure.score import Subject, quality
from saccade.measure.speed import speed_round
from saccade.measure.summary import summarise

# the source that a result depends on besides the method's own file
SOURCES = ("core", "ops", "attach", "models", "tasks", "measure/score.py", "measure/speed.py", "measure/bytes.py")


def compare(
    model: str | Path = "smollm2",
    methods: Sequence[Spec] | None = None,
    budgets: Sequence[float | str | Budget] = BUDGETS,
    tasks: Sequence[str] | None = None,
    tokens: int | None = None,
    out: str | Path | None = None,
    quick: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    lengths: Sequence[int] | None = None,
    count: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> Path:
    """Measure, and return the folder that holds run.json, env.json, cells.jsonl and summary.json.

    methods: names, "name:option=value", "a+b", or Methods; None: all that can run. `full`, `random` (once per part in
        use), `streaming` and `oracle-topk` always take part
    out: the folder; asked for the same again, finished cells are not computed anew
    tokens, count, lengths: length and number of samples, and the lengths that are timed
    dtype: None: bfloat16 where the device computes in it natively, else float32

    Raises:
        UnknownName, BadOption, BadBudget, DoesNotCompose: of what was asked, before anything is loaded.
        CannotRun: a method that was named cannot work in this model.
        ModelUnavailable: the model cannot be had.
        CorruptResult: the folder holds a broken line.
    """
    config = Config.of(model, methods, budgets, tasks, tokens, quick, seed, lengths, count, dtype, device)
    return execute(config, _folder(config, out), progress or _unwatched)


def plan(
    model: str | Path = "smollm2",
    methods: Sequence[Spec] | None = None,
    budgets: Sequence[float | str | Budget] = BUDGETS,
    tasks: Sequence[str] | None = None,
    tokens: int | None = None,
    quick: bool = False,
    seed: int = 0,
    *,
    lengths: Sequence[int] | None = None,
    count: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> Plan:
    """What the same call of `compare` will cost: minutes, memory, downloads and cells; nothing heavy is loaded.

    Raises:
        UnknownName, BadOption, BadBudget, DoesNotCompose: as `compare` would.
    """
    config = Config.of(model, methods, budgets, tasks, tokens, quick, seed, lengths, count, dtype, device)
    return estimate(config, all_cells(config, config.contestants))


def _unwatched(event: Event) -> None:
    """Nobody is watching."""


def _folder(config: Config, out: str | Path | None) -> Path:
    folder = Path(out) if out is not None else Path("saccade-runs") / config.name
    if folder.exists() and not folder.is_dir():
        raise BadOption(f"out={str(out)!r}", "it is a file", "Give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "run.json").is_file():
        raise BadOption(f"out={str(out)!r}", "it holds other files and no run.json", "Give a new or empty folder.")
    return folder


# --- cells ------------------------------------------------------------------------------------------------------------


def all_cells(config: Config, contestants: Sequence[Contestant], identity: str = "") -> list[Cell]:
    """In the order in which they run. `identity` is that of the loaded model and its surroundings."""
    return [*quality_cells(config, contestants, identity), *speed_cells(config, contestants, identity)]


def quality_cells(config: Config, contestants: Sequence[Contestant], identity: str) -> Iterator[Cell]:
    """`full` twice on every task, then each contestant at each budget on the tasks that have something for it to do."""
    for name, count in config.counts.items():
        for repeat in (0, 1):
            yield _quality(config, Contestant(), WHOLE, name, count, repeat, identity)
    for who in contestants[1:]:
        for budget in config.budgets:
            for name, count in config.counts.items():
                if who.exercised(all_tasks.get(name).one_pass):
                    yield _quality(config, who, budget, name, count, 0, identity)


def _quality(
    config: Config, who: Contestant, budget: Budget, task: str, count: int, repeat: int, identity: str
) -> Cell:
    mark = digest([identity, who.identity()])
    return Cell(
        "quality", config.model_name, who.label, str(budget), task, config.tokens, count, repeat, config.dtype,
        config.seed, mark,
    )  # fmt: skip


def speed_cells(config: Config, contestants: Sequence[Contestant], identity: str) -> Iterator[Cell]:
    """One per length and round."""
    field = [c.identity() for c in contestants if c.timed]
    mark, budget = digest([identity, field]), str(config.timed_budget)
    for tokens in config.lengths:
        for number in range(config.rounds):
            yield Cell(
                "speed", config.model_name, "*", budget, "speed", tokens, 1, number, config.dtype, config.seed, mark
            )


def not_exercised(config: Config, contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Pairs that were left out because the task has nothing for the method to do."""
    return [
        {"label": who.label, "part": who.part, "task": name}
        for who in contestants
        for name in config.counts
        if not who.exercised(all_tasks.get(name).one_pass)
    ]


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Bench:
    """The loaded model, and what the work on a cell looks up."""

    config: Config
    subject: Subject
    contestants: dict[str, Contestant] = field(default_factory=dict)

    @functools.cache  # noqa: B019  a bench lives as long as its run
    def samples(self, task: str, tokens: int, count: int) -> list[Any]:
        """The same for every contestant."""
        return all_tasks.get(task).samples(self.subject.tokenizer, tokens, count, self.config.seed)

    def work(self, cell: Cell) -> dict[str, Any]:
        """The measured part of a cell's line."""
        if cell.kind == "speed":
            return self._speed(cell)
        budget = WHOLE if cell.label == FULL else Budget.of(cell.budget)
        samples, task = self.samples(cell.task, cell.tokens, cell.count), all_tasks.get(cell.task)
        who = self.contestants[cell.label]
        return quality(self.subject, who, budget, task, samples, cell.seed, again=cell.repeat == 1)

    def _speed(self, cell: Cell) -> dict[str, Any]:
        budget = Budget.of(cell.budget)
        text = self.samples("loss", cell.tokens, 1)[0]
        ids = torch.cat([text.context, text.continuation], 1)[:, : cell.tokens]
        field = [(who, budget if who.methods else WHOLE) for who in self.contestants.values() if who.timed]
        return speed_round(self.subject, field, ids, cell.repeat, cell.seed)


def execute(config: Config, folder: Path, progress: Progress) -> Path:
    """Run what a configuration says, in a folder that may hold a part of it already."""
    results = Results(folder / "cells.jsonl")
    if results.notice:
        progress(Event("note", results.notice))
    progress(Event("note", f"loading {config.model_name}"))
    subject = Subject(*models.load(config.model, dtype=config.dtype, device=config.device))
    _check_lengths(config, subject.model)
    contestants, left_out = entrants(config, subject.model)
    for entry in left_out:
        progress(Event("note", f"{entry['label']} is left out: {entry['reasons'][0]}"))
    env = environment(config.device)
    identity = digest([fingerprint(subject.model), env, _sources()])
    cells = all_cells(config, contestants, identity)
    run = _run_record(config, contestants, left_out, cells)
    write_json(folder / "env.json", env)
    write_json(folder / "run.json", run)
    bench = Bench(config, subject, {c.label: c for c in contestants})
    run_cells(cells, bench.work, results, lambda cell: weigh(cell, bench.contestants), progress)
    write_json(folder / "summary.json", summarise(run, results.lines))
    progress(Event("end", str(folder), len(cells), len(cells)))
    return folder


def entrants(config: Config, model: Any) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """Those that can run in this model, equipped with its artefacts; and those left out, with every reason.

    Raises:
        CannotRun: one that was asked for by name cannot.
    """
    mark, present, left_out = fingerprint(model), [], []
    for who in config.contestants:
        who = who.equipped(mark)
        reasons = list(dict.fromkeys(r for b in config.budgets for r in who.reasons(model, b)))
        if reasons and who.label in (config.asked or ()):
            raise CannotRun(f"compare {who.label!r} on {config.model_name}", reasons, "Leave it out of methods.")
        if reasons:
            left_out.append({"label": who.label, "reasons": reasons})
        else:
            present.append(who)
    return present, left_out


def _check_lengths(config: Config, model: Any) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(config.tokens, *config.lengths, 0)
    if limit and longest > limit:
        raise BadInput(
            f"compare at {longest:,} tokens", f"{config.model_name} was trained for {limit:,}", "Stay within that."
        )


@functools.cache
def _sources() -> str:
    root = Path(saccade.__file__).parent
    files = [f for part in SOURCES for f in ([root / part] if part.endswith(".py") else (root / part).rglob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()


def _run_record(
    config: Config, contestants: Sequence[Contestant], left_out: list[dict[str, Any]], cells: Sequence[Cell]
) -> dict[str, Any]:
    """run.json: what was asked, what was made of it, and the keys of the cells in order."""
    return {
        "schema": SCHEMA,
        "saccade": saccade.__version__,
        "command": config.command(),
        **config.public(),
        "contestants": [c.label for c in contestants],
        "left_out": left_out,
        "not_exercised": not_exercised(config, contestants),
        "tasks": {name: _about(all_tasks.get(name)) for name in config.counts},
        "cells": [cell.key for cell in cells],
    }


def _about(task: Any) -> dict[str, Any]:
    return {name: getattr(task, name) for name in ("title", "metric", "query_aware", "one_pass")}
