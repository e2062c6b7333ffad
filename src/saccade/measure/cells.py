"""One unit of work, and the key under which its result is found again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from saccade.measure.environment import digest

SCHEMA = 1
FULL = "full"  # the model as it is, which all others are held against


@dataclass(frozen=True)
class Cell:
    """What determines a result, and no more.

    kind: "quality" scores one contestant on one task; "speed" times all of them, once each, at one length
    task: of quality; tokens: how long its samples are, or the length that is timed
    repeat: 0; 1 is the second run of `full` in another order and in batches of two; of speed, the number of the round
    identity: digest of all else: weights, environment, the source of library and methods, options, artefacts
    """

    kind: Literal["quality", "speed"]
    model: str
    label: str
    budget: str
    task: str
    tokens: int
    count: int
    repeat: int
    dtype: str
    seed: int
    identity: str

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits."""
        return digest([SCHEMA, asdict(self)])

    @property
    def vital(self) -> bool:
        """Without `full` nothing can be compared."""
        return self.label == FULL

    @property
    def alone(self) -> bool:
        """A clock runs."""
        return self.kind == "speed"

    def head(self) -> dict[str, Any]:
        """The first fields of its line."""
        return {"schema": SCHEMA, "key": self.key, **asdict(self)}

    def __str__(self) -> str:
        if self.kind == "speed":
            return f"speed at {self.tokens:,} tokens, round {self.repeat + 1}"
        return f"{self.label} at {self.budget}: {self.task}" + (", again" if self.repeat else "")
