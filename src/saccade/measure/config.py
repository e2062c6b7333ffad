"""What a comparison is asked to do, resolved to the last default: run.json says it all, and a line repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from saccade import tasks as all_tasks
from saccade.core.budget import Budget
from saccade.core.errors import BadOption
from saccade.measure.contestants import Contestant, Spec, of_families, parse, usual, with_baselines
from saccade.measure.environment import digest, usual_dtype
from saccade.models.loading import DTYPES


@dataclass(frozen=True)
class Size:
    """How much is measured: budgets, tokens of a sample, samples per task, lengths and rounds of the timing."""

    budgets: tuple[float, ...]
    tokens: int
    counts: dict[str, int]
    lengths: tuple[int, ...]
    rounds: int


# chosen so that the default ends within 5 minutes on 2 cores, and quick within 90 seconds
USUAL = Size((0.5, 0.25, 0.1), 320, {"continuation-loss": 3, "passkey": 3}, (256, 512), 2)
QUICK = Size((0.25,), 236, {"continuation-loss": 2, "passkey": 2}, (192,), 1)  # half of 236 just holds a passkey
SLOW = ("cpu", "float32")  # two to three times as slow as bfloat16 where that is native: half the tokens, timed once
LEAST_LENGTH = 32  # tokens that are timed
COUNT = 4  # of a task that the sizes do not name
ORACLE = "oracle-topk"
BASELINES = ("random", "streaming", ORACLE)
USUAL_BUDGET = 0.25  # the one that is timed and drawn is the nearest to it


@dataclass(frozen=True)
class Config:
    """A comparison with nothing left open. `contestants` are objects; everything else is plain data."""

    model: str
    contestants: tuple[Contestant, ...]
    asked: tuple[str, ...] | None  # labels of the methods that were named; None: those of the families, or the usual
    families: tuple[str, ...]  # all of whose methods take part, beside those that were named
    without: tuple[str, ...]  # methods of these families that do not
    budgets: tuple[Budget, ...]
    counts: dict[str, int]  # task -> samples
    tokens: int
    lengths: tuple[int, ...]
    rounds: int
    dtype: str
    device: str
    seed: int
    quick: bool
    count: int | None  # samples per task if they were given

    @classmethod
    def of(
        cls,
        model: str | Path = "smollm2",
        methods: Sequence[Spec] | None = None,
        budgets: Sequence[float | str | Budget] | None = None,
        tasks: Sequence[str] | None = None,
        tokens: int | None = None,
        quick: bool = False,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        count: int | None = None,
        rounds: int | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        families: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> Config:
        """Fill in what was left open.

        Raises:
            UnknownName, BadOption, BadBudget, DoesNotCompose: of what was asked.
        """
        dtype = dtype or usual_dtype(device)
        size = _size(quick, dtype, device)
        named = [parse(m) for m in methods or ()]
        whole = [parse(m) for m in of_families(families, without)]
        chosen = usual() if methods is None and not families else [*named, *whole]
        counts = dict(_counted(t, size, count) for t in (size.counts if tasks is None else tasks))
        config = cls(
            model=str(model),
            contestants=tuple(with_baselines(chosen, BASELINES)),
            asked=None if methods is None else tuple(c.label for c in named),
            families=tuple(families),
            without=tuple(without),
            budgets=tuple(map(_as_written, size.budgets if budgets is None else budgets)),
            counts=counts,
            tokens=size.tokens if tokens is None else tokens,
            lengths=size.lengths if lengths is None else tuple(sorted(set(lengths))),
            rounds=size.rounds if rounds is None else rounds,
            dtype=dtype,
            device=device,
            seed=seed,
            quick=quick,
            count=count,
        )
        config._check()
        return config

    def _check(self) -> None:
        if self.dtype not in DTYPES:
            raise BadOption(f"dtype {self.dtype!r}", "there is none of that name", f"Say one of: {', '.join(DTYPES)}.")
        low = {"tokens": self.tokens, "rounds": self.rounds, **{f"count of {t}": n for t, n in self.counts.items()}}
        wrong = {name: value for name, value in low.items() if value < 1}
        if wrong:
            raise BadOption(f"compare({wrong})", "there is nothing to measure", "Give numbers from 1.")
        short = [n for n in self.lengths if n < LEAST_LENGTH]
        if short:
            raise BadOption(f"lengths={short}", "that is too short to be timed", f"Give {LEAST_LENGTH} or more.")
        if not self.budgets:
            raise BadOption("budgets=()", "nothing to compare at", "Give at least one, such as 0.25.")

    @property
    def timed_budget(self) -> Budget:
        """The budget that is timed and drawn."""
        return min(self.budgets, key=lambda b: abs(b.fraction(self.tokens) - USUAL_BUDGET) if b.unit != "bytes" else 1)

    def public(self) -> dict[str, Any]:
        """The same as plain data for run.json, without the path of a model on this machine."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"model": self.model_name, "contestants": [c.label for c in self.contestants]}
        return plain | {"budgets": [str(b) for b in self.budgets], "timed_budget": str(self.timed_budget)}

    @property
    def model_name(self) -> str:
        """A known or hub name as it is; of a path only the last part."""
        return Path(self.model).name if Path(self.model).exists() else self.model

    @property
    def name(self) -> str:
        """The same for the same request; the folder of a run is called so."""
        return f"compare-{digest(self.public())[:8]}"

    def _tasks(self) -> list[str]:
        """As `--tasks` takes them."""
        size = _size(self.quick, self.dtype, self.device)
        usual = dict(_counted(name, size, self.count) for name in self.counts)
        return [name if n == usual[name] else f"{name}={n}" for name, n in self.counts.items()]

    def command(self) -> str:
        """The line that repeats it."""
        parts = ["saccade", "compare", "--model", self.model_name]
        if self.asked is not None:
            parts += ["--methods", *self.asked]
        parts += ["--family", *self.families] if self.families else []
        parts += ["--without", *self.without] if self.without else []
        parts += ["--budgets", *map(str, self.budgets), "--tasks", *self._tasks(), "--tokens", str(self.tokens)]
        parts += [] if self.count is None else ["--count", str(self.count)]
        parts += ["--quick"] if self.quick else []
        parts += ["--lengths", *map(str, self.lengths), "--rounds", str(self.rounds)]
        parts += ["--dtype", self.dtype, "--device", self.device]
        return shlex.join([*parts, "--seed", str(self.seed)])


def _size(quick: bool, dtype: str, device: str) -> Size:
    """What ends in time on such a device in such a precision."""
    size = QUICK if quick else USUAL
    if (device, dtype) != SLOW:
        return size
    return replace(size, tokens=size.tokens // 2, lengths=tuple(n // 2 for n in size.lengths), rounds=1)


def _counted(spec: str, size: Size, count: int | None) -> tuple[str, int]:
    """A task, and how many samples of it: those of "NAME=N", else `count`, else the usual ones.

    Raises:
        UnknownName, BadOption: there is no such task, or N is no number.
    """
    name, sign, own = spec.partition("=")
    name = all_tasks.get(name).name
    if sign and not own.isdecimal():
        raise BadOption(f"compare on {spec!r}", "that is no number of samples", f"Say {name} or {name}=8.")
    return name, int(own) if sign else size.counts.get(name, COUNT) if count is None else count


def _as_written(budget: float | str | Budget) -> Budget:
    """Rounded to what cells, tables and the line that repeats it say of it."""
    return Budget.of(str(Budget.of(budget)))
