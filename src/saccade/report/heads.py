"""What an artefact says of each head, drawn: scores of a probe, gates, rankings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saccade.core import registry
from saccade.core.artefact import Artefact
from saccade.core.card import Card
from saccade.core.errors import BadInput
from saccade.report import tables

SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class Heads:
    """An artefact with numbers for each head, [layers heads]; `names` are those of such tensors."""

    artefact: Artefact
    names: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> Heads:
        """Read an artefact by one of its two files.

        Raises:
            BadArtefact: a file is missing or cannot be read.
            BadInput: it holds nothing per head.
        """
        made = Artefact.load(path)
        shapes = {name: tuple(x.shape) for name, x in made.tensors.items()}
        flat = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        names = tuple(name for name, shape in flat.items() if shape == next(iter(flat.values())))
        if not names:
            found = f"it holds {', '.join(f'{n} {list(s)}' for n, s in shapes.items()) or 'nothing'}"
            raise BadInput(f"a report on {Path(path).name}", found, "Only [layers, heads] is shown.")
        return cls(made, tuple(sorted(names, key=_main_first)))

    @property
    def card(self) -> Card | None:
        """Of the method that made it; None where this machine does not have it."""
        return registry.card(self.artefact.method) if self.artefact.method in registry.list_methods() else None

    def values(self, name: str) -> list[list[float]]:
        """By layer and head."""
        return self.artefact.tensors[name].tolist()

    def table(self) -> tables.Table:
        """Every head, the highest of the first numbers on top."""
        columns = [self.values(name) for name in self.names]
        places = [(i, j) for i, layer in enumerate(columns[0]) for j in range(len(layer))]
        places.sort(key=lambda at: -columns[0][at[0]][at[1]])
        rows = [[tables.Cell(f"{i}.{j}", i + j / 1000), *(tables.cell(x[i][j], "score") for x in columns)]
                for i, j in places]  # fmt: skip
        return tables.Table("Every head, layer.head", ("head", *self.names), rows)

    def facts(self) -> list[tuple[str, str]]:
        """What it was made on, and what was seen on the way."""
        made = self.artefact
        known = [("Model", made.model), ("Method", made.method), ("Made on", made.data), ("Version", made.version)]
        known += [(name[:1].upper() + name[1:], _flat(value)) for name, value in made.figures.items()]
        return known + [("Options", ", ".join(f"{k}={v}" for k, v in made.options.items()) or "none")]


def _main_first(name: str) -> tuple[bool, str]:
    return name != "score", name


def _flat(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
