"""What is trained: on what, with which mixers, how long, from which seeds. Everything a result depends on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from saccade.core.budget import Budget
from saccade.core.errors import BadOption
from saccade.measure.environment import digest
from saccade.measure.store import CELLS
from saccade.methods.nets import LanguageModel, Spec, VisionModel
from saccade.tasks import training
from saccade.tasks.training import TrainingTask

BASELINES = ("full", "random")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
NET = ("channels", "layers", "heads", "rows", "steps", "learning_rate")


@dataclass(frozen=True)
class Plan:
    """One training, the same for every mixer and seed.

    tokens, rows, steps: of a row, of a batch (over all processes), and batches; channels, layers, heads: of the net
    learning_rate: the highest; it rises over the first tenth of the steps and falls to a tenth along a cosine
    """

    task: str
    budget: str
    tokens: int
    rows: int
    steps: int
    channels: int
    layers: int
    heads: int
    learning_rate: float
    dtype: Literal["float32", "float64"] = "float32"

    @classmethod
    def of(cls, task: str, budget: float | str | Budget, tokens: int | None, dtype: str, **given: Any) -> Plan:
        """With the task's own values for what is None among channels, layers, heads, rows, steps and learning_rate.

        Raises:
            UnknownName: no such task. BadOption: a number that is none, or a length that the task cannot have.
        """
        made = training.get(task, tokens)
        if dtype not in DTYPES:
            raise BadOption(f"dtype={dtype!r}", f"it takes {' or '.join(DTYPES)}", "Give one of these.")
        for name, value in given.items():
            if value is not None and value <= 0:
                raise BadOption(f"{name}={value}", "it must be above zero", "Give such a number.")
        sizes = {name: getattr(made, name) if given.get(name) is None else given[name] for name in NET}
        return cls(made.name, str(Budget.of(budget)), made.tokens, dtype=dtype, **sizes)

    def source(self) -> TrainingTask:
        """The task."""
        return training.get(self.task, self.tokens)

    def net(self, mixer: Spec, seed: int) -> torch.nn.Module:
        """An untrained net. Raises what `make_mixer` raises."""
        task = self.source()
        sizes = {name: getattr(self, name) for name in ("channels", "layers", "heads", "budget")}
        if task.kind == "language":
            made = LanguageModel(task.vocabulary, mixer=mixer, seed=seed, **sizes)
        else:
            made = VisionModel(task.vocabulary, task.image, patch=task.patch, mixer=mixer, seed=seed, **sizes)
        return made.to(DTYPES[self.dtype])

    def mark(self, mixer: str, seed: int) -> str:
        """What tells one training from every other."""
        return digest(dataclasses.asdict(self) | {"mixer": mixer, "seed": seed})


def contestants(mixers: Sequence[str] | Mapping[str, Spec], against: Sequence[str] = ()) -> dict[str, Spec]:
    """Label -> mixer: `full`, those that were asked for, their baselines, then `random` unless one of its forms was."""
    given = mixers if isinstance(mixers, Mapping) else {}
    asked = dict(given) or dict(zip(labels(mixers), mixers))
    asked |= {label: text for label, text in zip(labels(against, given), against) if label not in asked}
    last = {} if any(label.partition(":")[0] == "random" for label in asked) else {"random": "random"}
    return {"full": "full"} | asked | last


def labels(names: Iterable[str], given: Container[str] = ()) -> list[str]:
    """What mixers are called in the table: labels as they were given, names with hyphens."""
    return [name if name in given else _hyphened(*name.partition(":")) for name in names]


def _hyphened(name: str, colon: str, options: str) -> str:
    return name.replace("_", "-") + colon + options


def cell_folder(out: str | Path, mixer: str, seed: int) -> Path:
    """Of a training's own."""
    return Path(out) / CELLS / file_name(mixer, seed)


def file_name(mixer: str, seed: int) -> str:
    """Of a training's own folder."""
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', mixer)}-seed{seed}"
