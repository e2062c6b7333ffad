"""Which cells make up a comparison: who runs at which budgets, on which tasks, timed at which lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saccade import tasks as all_tasks
from saccade.attach import fingerprint
from saccade.attach.probe import probe
from saccade.core.budget import FULL as WHOLE
from saccade.core.budget import Budget
from saccade.core.errors import CannotRun
from saccade.measure.cells import Cell
from saccade.measure.config import ORACLE, Config
from saccade.measure.contestants import Contestant, parse
from saccade.measure.environment import digest

ORACLE_TOKENS = 4096  # of a sample; beyond, its 3 x 10^8 pairs a layer to choose from take minutes a sample on a CPU


@dataclass(frozen=True)
class Entry:
    """A contestant, with the budgets at which it can run. Of `full`, and of what takes none, that is the whole."""

    who: Contestant
    budgets: tuple[Budget, ...]


def everybody(config: Config) -> list[Entry]:
    """All that take part, before a model has been seen."""
    present = [who for who in config.contestants if not _too_long(config, who)]
    return [Entry(who, config.budgets if who.takes_budget else (WHOLE,)) for who in present]


def _too_long(config: Config, who: Contestant) -> list[str]:
    """Why it stays out of a comparison of such samples unless it is named."""
    if who.label != ORACLE or ORACLE in (config.asked or ()) or config.tokens <= ORACLE_TOKENS:
        return []
    return [f"it ranks all keys for every query, which takes long at {config.tokens} tokens; name it to have it"]


def _without_budget(who: Contestant) -> list[str]:
    """Why it is there once, and not at every budget."""
    if who.takes_budget or not who.methods:
        return []
    return ["it takes no budget: what it saves follows from its options, and it is measured once, at 1"]


def entrants(config: Config, model: Any) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Those that can run in this model, equipped with its artefacts; and what is left out, with every reason.

    Raises:
        CannotRun: one that was asked for by name can run at no budget.
    """
    mark, found, present, left_out = fingerprint(model), probe(model), [], []
    for who in map(parse, config.without):
        if who not in config.contestants:  # it may be named beside
            left_out += _refusals(who, {b: ["that was asked for"] for b in config.budgets})
    for who in config.contestants:
        reasons = _too_long(config, who) or _without_budget(who)
        left_out += _refusals(who, {b: reasons for b in config.budgets if who.takes_budget or b != WHOLE})
    for entry in everybody(config):
        who = entry.who.equipped(mark)
        reasons = {b: who.reasons(model, b, found) for b in entry.budgets}
        can = tuple(b for b in entry.budgets if not reasons[b])
        if not can and who.label in (config.asked or ()):
            every = list(dict.fromkeys(r for why in reasons.values() for r in why))
            raise CannotRun(f"compare {who.label!r} on {config.model_name}", every, "Leave it out of methods.")
        present += [Entry(who, can)] if can else []
        left_out += _refusals(who, reasons)
    return present, left_out


def _refusals(who: Contestant, reasons: dict[Budget, list[str]]) -> list[dict[str, Any]]:
    """One per list of reasons, with the budgets that it concerns."""
    found: dict[tuple[str, ...], list[str]] = {}
    for budget, why in reasons.items():
        found.setdefault(tuple(why), []).append(str(budget))
    return [{"label": who.label, "budgets": b, "reasons": list(why)} for why, b in found.items() if why]


def all_cells(config: Config, entries: Sequence[Entry], identity: str = "") -> list[Cell]:
    """In the order in which they run. `identity` is that of the loaded model and its surroundings."""
    return [*_quality_cells(config, entries, identity), *_speed_cells(config, entries, identity)]


def _quality_cells(config: Config, entries: Sequence[Entry], identity: str) -> Iterator[Cell]:
    """`full` twice on every task, then each contestant at each budget on the tasks that have something for it to do."""
    for entry in entries:
        mark = digest([identity, entry.who.identity()])
        repeats = (0,) if entry.who.methods else (0, 1)
        for budget in entry.budgets:
            for task, count in config.counts.items():
                if entry.who.exercised(all_tasks.get(task).one_pass):
                    for repeat in repeats:
                        yield _cell(
                            config, "quality", entry.who.label, budget, task, config.tokens, count, repeat, mark
                        )


def _speed_cells(config: Config, entries: Sequence[Entry], identity: str) -> Iterator[Cell]:
    """One per length and round."""
    field = [[who.identity(), str(budget)] for who, budget in timed(config, entries)]
    mark = digest([identity, field])
    for tokens in config.lengths:
        for number in range(config.rounds):
            yield _cell(config, "speed", "*", config.timed_budget, "speed", tokens, 1, number, mark)


def _cell(
    config: Config, kind: Any, label: str, budget: Budget, task: str, tokens: int, count: int, repeat: int, mark: str
) -> Cell:
    places = {"model": config.model_name, "dtype": config.dtype, "seed": config.seed, "identity": mark}
    work = {"label": label, "budget": str(budget), "task": task, "tokens": tokens, "count": count, "repeat": repeat}
    return Cell(kind=kind, **work, **places)


def timed(config: Config, entries: Sequence[Entry]) -> list[tuple[Contestant, Budget]]:
    """Who is timed, and at which budget: the one that `config` times, where he can run at it; or the only one."""
    budget = config.timed_budget
    return [
        (e.who, budget if e.who.takes_budget else WHOLE)
        for e in entries
        if e.who.timed and (budget in e.budgets or not e.who.takes_budget)
    ]


def not_exercised(config: Config, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Pairs that were left out because the task has nothing for the method to do."""
    return [
        {"label": e.who.label, "part": e.who.part, "task": name}
        for e in entries
        for name in config.counts
        if not e.who.exercised(all_tasks.get(name).one_pass)
    ]
