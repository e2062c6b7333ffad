"""What a task is: samples of exact length, and one number per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """One measurement: the model reads `context`, then `continuation` is forced on it and the `scored` part is judged.

    scored: the tokens of the continuation that count, as a slice or as places; the rest is given
    one_pass: context and continuation go through in one forward; else the continuation meets the cache of the context
    facts: what a report may break the score down by (depth, length, ...); plain JSON
    """

    id: str
    context: Int[Tensor, "1 n"]
    continuation: Int[Tensor, "1 m"]
    scored: slice | list[int]
    one_pass: bool = False
    facts: dict[str, float | int | str] = field(default_factory=dict)


class Task(ABC):
    """A source of samples and the way to score them. Class attributes are literals, so that `describe` needs no torch.

    metric: "nll" in nats per token, lower is better; "hit" 1.0 or 0.0, higher is better
    query_aware: the question is already in the context when it is compressed; None where there is no question
    chance: the score of a guesser who has understood the format; None for "nll"
    spread: standard deviation between samples for dense SmolLM2 at 1,024 tokens, for power calculations; the figures
        are printed by `python benchmarks/task_spread.py`
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[Literal["nll", "hit"]]
    query_aware: ClassVar[bool | None]
    one_pass: ClassVar[bool] = False
    chance: ClassVar[float | None] = None
    spread: ClassVar[float]

    @abstractmethod
    def samples(self, tokenizer, tokens: int, count: int, seed: int) -> list[Sample]:
        """`count` samples whose context and continuation together have exactly `tokens` tokens.

        Sample i depends on the seed and on i, not on `count`: more samples only add to the list.

        Raises:
            BadInput: `tokens` is too few for the task, or more than the shipped text holds.
        """

    def score(self, logits: Float[Tensor, "m vocab"], sample: Sample) -> float:
        """Row i of `logits` predicts token i of the continuation.

        "hit" asks that every scored token is the arg-max: exactly then greedy decoding fills in the answer by itself.
        """
        wanted = sample.continuation[0, sample.scored].to(logits.device)
        rows = logits[sample.scored].float()
        if self.metric == "nll":
            return torch.nn.functional.cross_entropy(rows, wanted).item()
        return float((rows.argmax(-1) == wanted).all())
