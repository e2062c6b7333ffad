"""Next-token loss in one pass: what a sparse prefill does to language modelling."""

from __future__ import annotations

import torch

from saccade.core.errors import BadInput
from saccade.tasks._base import Sample, Task
from saccade.tasks._text import passage, start_token

SCORED_TOKENS = 512
LEAST_TOKENS = 32


def check_length(name: str, tokens: int) -> None:
    """That a loss over so few tokens still means something.

    Raises:
        BadInput: it does not.
    """
    if tokens < LEAST_TOKENS:
        asked = f"{name} in {tokens} tokens"
        raise BadInput(asked, "that is too short to mean anything", f"Ask for {LEAST_TOKENS}.")


class Loss(Task):
    """Mean loss in nats on the last 512 tokens of a passage of Moby-Dick (on the last half of a shorter one)."""

    name = "loss"
    title = "loss on the last 512 tokens"
    metric = "nll"
    query_aware = None
    one_pass = True
    spread = 0.2

    def samples(self, tokenizer, tokens: int, count: int, seed: int) -> list[Sample]:
        check_length(self.name, tokens)
        return [self._sample(tokenizer, tokens, index, seed) for index in range(count)]

    def _sample(self, tokenizer, tokens: int, index: int, seed: int) -> Sample:
        scored = min(SCORED_TOKENS, tokens // 2)
        start = start_token(tokenizer)
        text, place = passage(tokenizer, tokens - len(start), index, seed)
        ids = torch.tensor([start + text])
        return Sample(
            id=f"{self.name}/{tokens}/{seed}/{index}",
            context=ids[:, :-scored],
            continuation=ids[:, -scored:],
            scored=slice(0, scored),
            one_pass=self.one_pass,
            facts={"index": index, "tokens": tokens, "text_start": place, "scored_tokens": scored},
        )
