"""Statements hidden in a long text, and a question about them at the end."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from random import Random

import torch

from saccade.core.errors import BadInput
from saccade.tasks._base import Sample, Task
from saccade.tasks._text import encode, passage, sentence_start, start_token

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # sample i has depth i mod 5
NAMES = ("tiger", "lion", "bear", "wolf", "deer", "rabbit", "snake", "turtle", "eagle", "mouse")


@dataclass(frozen=True)
class Riddle:
    """intro, text with `needles` (depth, statement), then `steps` (what is given, what has to be written).

    The first given text is the question. Answers begin with their space, statements too, and end without one.
    """

    intro: str
    needles: tuple[tuple[float, str], ...]
    steps: tuple[tuple[str, str], ...]
    facts: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """All that has to be written, in words."""
        return ", ".join(wanted.strip() for _, wanted in self.steps)


class NeedleTask(Task):
    """A riddle for every index, hidden in Moby-Dick."""

    @abstractmethod
    def riddle(self, index: int, seed: int) -> Riddle:
        """What is hidden in sample `index` and what is asked."""

    def samples(self, tokenizer, tokens: int, count: int, seed: int) -> list[Sample]:
        riddles = [self.riddle(index, seed) for index in range(count)]
        return [hide(tokenizer, r, tokens, i, seed, bool(self.query_aware), self.name) for i, r in enumerate(riddles)]


def number(random: Random) -> str:
    """Five digits: many tokens for most tokenizers, so that a guess is never right."""
    return str(random.randrange(10_000, 100_000))


def hide(tokenizer, riddle: Riddle, tokens: int, index: int, seed: int, query_aware: bool, task: str) -> Sample:
    """A sample of exactly `tokens` tokens; the question ends the context (query-aware) or begins the continuation.

    Raises:
        BadInput: no room for text around the needles.
    """
    intro = start_token(tokenizer) + encode(tokenizer, riddle.intro)
    needles = [(depth, encode(tokenizer, statement)) for depth, statement in riddle.needles]
    steps = [split(tokenizer, given, wanted) for given, wanted in riddle.steps]
    fixed = len(intro) + sum(len(ids) for _, ids in needles) + sum(len(a) + len(b) for a, b in steps)
    if tokens < 2 * fixed:
        found = f"needles and question alone take {fixed}"
        raise BadInput(f"{task} in {tokens} tokens", found, f"Ask for at least {2 * fixed}.")
    text, start = passage(tokenizer, tokens - fixed, index, seed)
    context = intro + plant(tokenizer, text, needles)
    if query_aware:
        context, steps[0] = context + steps[0][0], ([], steps[0][1])
    continuation, scored = written(steps)
    facts = {"index": index, "tokens": tokens, "text_start": start, "answer": riddle.answer, **riddle.facts}
    return Sample(
        id=f"{task}/{tokens}/{seed}/{index}",
        context=torch.tensor([context]),
        continuation=torch.tensor([continuation]),
        scored=scored,
        facts=facts,
    )


def written(steps: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """All steps one after the other, and where in them the wanted tokens stand."""
    ids: list[int] = []
    places: list[int] = []
    for given, wanted in steps:
        ids += given + wanted
        places += range(len(ids) - len(wanted), len(ids))
    return ids, places


def split(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of both as the tokenizer writes them side by side: an answer encoded alone may come out differently.

    A token that is only the space before the answer is given with the question: it is not what is asked for.
    """
    alone, both = encode(tokenizer, question), encode(tokenizer, question + answer)
    same = 0
    while same < min(len(alone), len(both)) and alone[same] == both[same]:
        same += 1
    while not tokenizer.decode([both[same]]).strip():
        same += 1
    return both[:same], both[same:]


def plant(tokenizer, text: list[int], needles: list[tuple[float, list[int]]]) -> list[int]:
    """Put each needle where a sentence begins, at or just before its depth (0 first, 1 last)."""
    out, at = [], 0
    for depth, needle in sorted(needles):
        place = max(at, sentence_start(tokenizer, text, round(depth * len(text))) if depth < 1 else len(text))
        out += text[at:place] + needle
        at = place
    return out + text[at:]
