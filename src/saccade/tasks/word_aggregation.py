"""The most frequent word of a long list: what is asked for lies nowhere, it is everywhere."""

from __future__ import annotations

from random import Random

import torch

from saccade.core import rng
from saccade.core.errors import BadInput
from saccade.tasks._base import Sample, Task
from saccade.tasks._needles import split
from saccade.tasks._text import encode, start_token

INTRO = "Below is a list of words. One of them is more frequent than all others.\n\n"
QUESTION = "\n\nThe most frequent word of the list is"
WORDS = (
    "apple bread chair cloud dance earth field glass green heart honey horse house light magic metal money mouth music "
    "night ocean paint paper peace phone plant queen radio river salad shirt silver smile snow spoon stone storm sugar "
    "table tiger tower train water wheel"
).split()
BLOCK = 10  # words, of which COMMON are the frequent one
COMMON = 3
LEAST_BLOCKS = 2


class WordAggregation(Task):
    """Three of every ten words of a list are the same one, the others are drawn anew; the frequent one is asked for.

    In the manner of RULER's common words (arXiv 2404.06654, section 3.3), for one word instead of ten.
    """

    name = "word-aggregation"
    title = "most frequent word of a list, question in the prompt"
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
        context = intro + self._words(tokenizer, common, random, room) + question
        return Sample(
            id=f"{self.name}/{tokens}/{seed}/{index}",
            context=torch.tensor([context]),
            continuation=torch.tensor([answer]),
            scored=slice(0, len(answer)),
            facts={"index": index, "tokens": tokens, "answer": common, "share": COMMON / BLOCK},
        )

    def _words(self, tokenizer, common: str, random: Random, room: int) -> list[int]:
        """The last `room` tokens of as many blocks as it takes: the first word may be cut."""
        others = [word for word in WORDS if word != common]
        ids: list[int] = []
        blocks = 0
        while len(ids) < room or blocks < LEAST_BLOCKS:
            block = [common] * COMMON + random.sample(others, BLOCK - COMMON)
            random.shuffle(block)
            ids += encode(tokenizer, "".join(f" {word}" for word in block))
            blocks += 1
        least = LEAST_BLOCKS * len(ids) // blocks
        if room < least:
            found = f"the question and two blocks of {BLOCK} words need more"
            raise BadInput(f"{self.name} with room for {max(room, 0)} tokens of words", found, f"Give it {least}.")
        return ids[len(ids) - room :]
