"""Many methods x budgets x tasks against `full`, with what it costs in quality, time and bytes: one run directory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade import models
from saccade import tasks as all_tasks
from saccade.attach import fingerprint
from saccade.core.budget import Budget
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.measure.cells import SCHEMA, Cell
from saccade.measure.config import Config
from saccade.measure.contestants import Spec
from saccade.measure.environment import deciding, digest, environment, sources
from saccade.measure.planning import Plan, estimate, weigh
from saccade.measure.program import Entry, all_cells, entrants, everybody, not_exercised, timed
from saccade.measure.runner import Engine, Event, Local, Progress, Queue, unwatched
from saccade.measure.score import Subject, quality
from saccade.measure.speed import speed_round
from saccade.measure.store import Store, write_json
from saccade.measure.summary import summarise

# the source that a result depends on besides the method's own file
SOURCES = ("core", "ops", "attach", "models", "tasks", "measure/score.py", "measure/speed.py", "measure/bytes.py")


def compare(
    model: str | Path = "smollm2",
    methods: Sequence[Spec] | None = None,
    budgets: Sequence[float | str | Budget] | None = None,
    tasks: Sequence[str] | None = None,
    tokens: int | None = None,
    out: str | Path | None = None,
    quick: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    lengths: Sequence[int] | None = None,
    count: int | None = None,
    rounds: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    families: Sequence[str] = (),
    without: Sequence[str] = (),
    engine: Engine | None = None,
) -> Path:
    """Measure, and return the folder that holds run.json, env.json, summary.json and the folder of cells.

    methods: names, "name:option=value", "a+b", or Methods; None: the usual ones (`Card.usual`). `full`, `random`
        (once per part in use) and `streaming` always take part, and `oracle-topk` up to 4,096 tokens
    families: "sparse", "cache", "decode": all their methods take part too; what cannot run is left out, with the reason
    without: methods of these families that are left out, say for their cost; one with other options may be named
    budgets, tasks, tokens, count: what is kept; what on, its length and number of samples ("NAME=N": N of this task)
    lengths, rounds: tokens at which to time, and how often
    quick: one budget, less of all. What is None ends within 5 minutes on 2 cores, quick within 90 seconds
    out: the folder; asked for the same again, finished cells are not computed anew, and asked for the same by several
        processes at once, these share the work
    dtype: None: bfloat16 where the device computes in it natively, else float32
    engine: None: this process; `saccade.engines.ray.Ray()`: the devices of a Ray cluster

    Raises:
        UnknownName, BadOption, BadBudget, DoesNotCompose: of what was asked, before anything is loaded.
        CannotRun: a method that was named cannot work in this model.
        ModelUnavailable: the model cannot be had.
        CorruptResult: the folder holds a broken cell.
    """
    given = (model, methods, budgets, tasks, tokens, quick, seed, lengths, count, rounds, dtype, device, families)
    config = Config.of(*given, without)
    return execute(config, _folder(config, out), progress or unwatched, engine or Local())


def plan(
    model: str | Path = "smollm2",
    methods: Sequence[Spec] | None = None,
    budgets: Sequence[float | str | Budget] | None = None,
    tasks: Sequence[str] | None = None,
    tokens: int | None = None,
    quick: bool = False,
    seed: int = 0,
    *,
    lengths: Sequence[int] | None = None,
    count: int | None = None,
    rounds: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    families: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Plan:
    """What the same call of `compare` will cost: minutes, memory, downloads and cells; nothing heavy is loaded.

    Raises:
        UnknownName, BadOption, BadBudget, DoesNotCompose: as `compare` would.
    """
    given = (model, methods, budgets, tasks, tokens, quick, seed, lengths, count, rounds, dtype, device, families)
    config = Config.of(*given, without)
    return estimate(config, all_cells(config, everybody(config)))


def _folder(config: Config, out: str | Path | None) -> Path:
    folder = Path(out) if out is not None else Path("saccade-runs") / config.name
    if folder.exists() and not folder.is_dir():
        raise BadOption(f"out={str(out)!r}", "it is a file", "Give a folder.")
    # hidden files are those that a process is about to write
    others = folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir())
    if others and not (folder / "run.json").is_file():
        raise BadOption(f"out={str(out)!r}", "it holds other files and no run.json", "Give a new or empty folder.")
    return folder


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What a bench says of itself. `mark` and `sources` tell whether two may share the work."""

    entries: Sequence[Entry]
    left_out: list[dict[str, Any]]
    environment: dict[str, Any]
    mark: str
    sources: str


@dataclass(eq=False)
class Bench:
    """The loaded model, and what the work on a cell looks up."""

    config: Config
    subject: Subject
    about: About

    @classmethod
    def load(cls, config: Config) -> Bench:
        """The model, and who can run in it.

        Raises:
            CannotRun: a method that was named cannot.
            BadInput: texts longer than the model was trained for.
            ModelUnavailable: it cannot be had.
        """
        subject = Subject(*models.load(config.model, dtype=config.dtype, device=config.device))
        _check_lengths(config, subject.model)
        entries, left_out = entrants(config, subject.model)
        env = environment(config.device)
        mark = digest([fingerprint(subject.model), deciding(env), _sources()])
        return cls(config, subject, About(entries, left_out, env, mark, _sources()))

    @functools.cache  # noqa: B019  a bench lives as long as its run
    def samples(self, task: str, tokens: int, count: int) -> list[Any]:
        """The same for every contestant."""
        return all_tasks.get(task).samples(self.subject.tokenizer, tokens, count, self.config.seed)

    def work(self, cell: Cell) -> dict[str, Any]:
        """The measured part of a cell's line."""
        if cell.kind == "speed":
            return self._speed(cell)
        samples, task = self.samples(cell.task, cell.tokens, cell.count), all_tasks.get(cell.task)
        who = next(e.who for e in self.about.entries if e.who.label == cell.label)
        return quality(self.subject, who, Budget.of(cell.budget), task, samples, cell.seed, again=cell.repeat == 1)

    def _speed(self, cell: Cell) -> dict[str, Any]:
        text = self.samples("loss", cell.tokens, 1)[0]
        ids = torch.cat([text.context, text.continuation], 1)[:, : cell.tokens]
        return speed_round(self.subject, timed(self.config, self.about.entries), ids, cell.repeat, cell.seed)


def execute(config: Config, folder: Path, progress: Progress, engine: Engine) -> Path:
    """Run what a configuration says, in a folder that may hold a part of it already."""
    progress(Event("note", f"loading {config.model_name}"))
    with Store(folder) as store:
        begin = _Beginning(config, store, progress)
        engine.run(functools.partial(Bench.load, config), begin, progress, config.device)
    run, lines = begin.run, {key: line for key in begin.run["cells"] if (line := store.read(key))}
    write_json(folder / "run.json", run)  # again: another process may have asked for something else meanwhile
    write_json(folder / "summary.json", summarise(run, lines))
    progress(Event("end", str(folder), len(run["cells"]), len(run["cells"])))
    return folder


@dataclass(eq=False)
class _Beginning:
    """From what the first bench says to the queue; `run` is then what run.json says."""

    config: Config
    store: Store
    progress: Progress
    run: dict[str, Any] = field(default_factory=dict)

    def __call__(self, about: About) -> Queue[Cell]:
        if about.sources != _sources():
            found = "they have another version of saccade than this process"
            raise CannotRun("compare on other machines", found, "Install the same everywhere.")
        for entry in about.left_out:
            who = f"{entry['label']} at {', '.join(entry['budgets'])}"
            self.progress(Event("note", f"{who} is left out: {entry['reasons'][0]}"))
        cells = all_cells(self.config, about.entries, about.mark)
        self.run = _run_record(self.config, about, cells)
        write_json(self.store.root / "run.json", self.run)
        write_json(self.store.root / "env.json", about.environment)
        return Queue(cells, self.store, functools.partial(weigh, self.config, about.entries), self.progress)


def _check_lengths(config: Config, model: Any) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(config.tokens, *config.lengths, 0)
    if limit and longest > limit:
        raise BadInput(
            f"compare at {longest:,} tokens", f"{config.model_name} was trained for {limit:,}", "Stay within that."
        )


def _sources() -> str:
    return sources(SOURCES)


def _run_record(config: Config, about: About, cells: Sequence[Cell]) -> dict[str, Any]:
    """run.json: what was asked, what was made of it, and the keys of the cells in order."""
    return {
        "schema": SCHEMA,
        "saccade": saccade.__version__,
        "command": config.command(),
        **config.public(),
        "contestants": [e.who.label for e in about.entries],
        "left_out": about.left_out,
        "not_exercised": not_exercised(config, about.entries),
        "tasks": {name: _about(all_tasks.get(name)) for name in config.counts},
        "cells": [cell.key for cell in cells],
    }


def _about(task: Any) -> dict[str, Any]:
    return {name: getattr(task, name) for name in ("title", "metric", "query_aware", "one_pass")}
