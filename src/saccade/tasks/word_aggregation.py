"""The most frequent of many words: what is asked for lies nowhere, it is everywhere."""

from __future__ import annotations

from random import Random

import torch

from saccade.core import rng
from saccade.core.errors import BadInput
from saccade.tasks._base import Sample, Task
from saccade.tasks._needles import split
from saccade.tasks._text import encode, start_token

INTRO = "Many games are played. One player wins most of them.\n\n"
GAME = " The winner is the {}."
QUESTION = " Who won most of the games? The winner is the"
WORDS = (
    "apple", "bread", "chair", "cloud", "dance", "earth", "field", "glass", "green", "heart", "honey", "horse",
    "house", "light", "magic", "metal", "money", "mouth", "music", "night", "ocean", "paint", "paper", "peace",
    "phone", "plant", "queen", "radio", "river", "salad", "shirt", "silver", "smile", "snow", "spoon", "stone",
    "storm", "sugar", "table", "tiger", "tower", "train", "water", "wheel",
)
BLOCK = 10  # games of a round, of which COMMON are won by the frequent word
COMMON = 5
LEAST_ROUNDS = 2


class WordAggregation(Task):
    """Five of every ten games are won by the same of 44 words, the others by others; the frequent one is asked for.

    In the manner of RULER's common words (arXiv 2404.06654, section 3.3), for one word instead of ten. Of a bare list
    of words the default model cannot tell the most frequent one; of whole sentences it can.
    """

    name = "word-aggregation"
    title = "most frequent of many words, question in the prompt"
    metric = "hit"
    query_aware = True
    chance = 0.022
    spread = 0.4

    def samples(self, tokenizer, tokens: int, count: int, seed: int) -> list[Sample]:
        return [self._sample(tokenizer, tokens, index, seed) for index in range(count)]

    def _sample(self, tokenizer, tokens: int, index: int, seed: int) -> Sample:
        random = rng.python("word-aggregation", seed, index)
        common = random.choice(WORDS)
        intro = start_token(tokenizer) + encode(tokenizer, INTRO)
        question, answer = split(tokenizer, QUESTION, f" {common}")
        room = tokens - len(intro) - len(question) - len(answer)
        games = _games(tokenizer, common, random, max(room, 0))
        if len(games) > room:
            found = f"two rounds of {BLOCK} games do not fit"
            raise BadInput(f"{self.name} in {tokens} tokens", found, f"Ask for at least {tokens - room + len(games)}.")
        return Sample(
            id=f"{self.name}/{tokens}/{seed}/{index}",
            context=torch.tensor([intro + games + question]),
            continuation=torch.tensor([answer]),
            scored=slice(0, len(answer)),
            facts={"index": index, "tokens": tokens, "answer": common, "share": COMMON / BLOCK},
        )


def _games(tokenizer, common: str, random: Random, room: int) -> list[int]:
    """The last `room` tokens of as many rounds as it takes (the first sentence may be cut), but of two at least."""
    others = [word for word in WORDS if word != common]
    ids: list[int] = []
    rounds = 0
    while len(ids) < room or rounds < LEAST_ROUNDS:
        words = [common] * COMMON + random.sample(others, BLOCK - COMMON)
        random.shuffle(words)
        ids += encode(tokenizer, "".join(GAME.format(word) for word in words))
        rounds += 1
    return ids[len(ids) - room :] if rounds > LEAST_ROUNDS else ids
