"""What a training task is: a batch for every step, the same whoever asks, and held-out batches to judge by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadOption
from saccade.models.known import Download

IGNORED = -100  # a target that does not count
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids [b n] with a target behind each, or pictures [b c h w] with one target each; IGNORED does not count.

    No row is padded.
    """

    inputs: Tensor
    targets: Int[Tensor, "*targets"]

    def rows(self, which: slice, device: Any = None) -> Batch:
        """Some of the rows, on a device."""
        return Batch(self.inputs[which].to(device), self.targets[which].to(device))


class TrainingTask(ABC):
    """A source of batches. Class attributes are literals, so that `describe` needs no torch.

    kind: "language" for the language model, "vision" for the vision model
    metric: "bits" per token, lower is better, or "accuracy", higher is better; over the targets that count
    tokens: of a row; of a picture its patches, which cannot be changed
    vocabulary: tokens, or classes of pictures
    channels, layers, heads, rows, steps, learning_rate: what it is trained with unless something else is asked for
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[Literal["language", "vision"]]
    metric: ClassVar[Literal["bits", "accuracy"]]
    vocabulary: ClassVar[int]
    tokens: int
    image: ClassVar[tuple[int, int, int]]
    patch: ClassVar[int]
    least_tokens: ClassVar[int] = 2
    channels: ClassVar[int] = 64
    layers: ClassVar[int] = 2
    heads: ClassVar[int] = 4
    rows: ClassVar[int] = 16
    steps: ClassVar[int]
    learning_rate: ClassVar[float] = 0.003

    def __init__(self, tokens: int | None = None):
        usual = type(self).tokens
        self.tokens = usual if tokens is None else tokens
        if self.kind == "vision" and self.tokens != usual:
            raise BadOption(f"{self.name} with {tokens} tokens", f"a picture has {usual} patches", "Leave it away.")
        if self.tokens < self.least_tokens:
            found = f"the shortest row has {self.least_tokens}"
            raise BadOption(f"{self.name} with {tokens} tokens", found, "Ask for more.")

    def missing(self) -> Download | None:
        """What `prepare` would fetch; None: nothing."""
        return None

    def prepare(self, progress: Progress) -> None:  # noqa: B027
        """Fetch what is needed, if it is not here; what is generated or shipped needs nothing.

        Raises:
            ModelUnavailable: it cannot be had.
        """

    @abstractmethod
    def batch(self, step: int, rows: int, seed: int) -> Batch:
        """What is read in a step: it depends on these three alone, so that a run can be taken up anywhere."""

    @abstractmethod
    def held_out(self, rows: int) -> list[Batch]:
        """What is judged on, in batches of so many rows; none of it is ever trained on."""

    def score(
        self, logits: Float[Tensor, "*targets vocabulary"], targets: Int[Tensor, "*targets"]
    ) -> tuple[float, int]:
        """Sum of the metric over the targets that count, and how many these are."""
        counts = targets != IGNORED
        logits, targets = logits[counts], targets[counts]
        if self.metric == "accuracy":
            return float((logits.argmax(-1) == targets).sum()), len(targets)
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return float(nats / torch.log(torch.tensor(2.0))), len(targets)

