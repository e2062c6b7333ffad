"""Sliding-window perplexity: one window after the other over a text, each judged on its second half."""

from __future__ import annotations

import torch

from saccade.core import rng
from saccade.tasks._base import Sample, Task
from saccade.tasks._text import room, sentence_start, start_token, whole
from saccade.tasks.loss import check_length


class Perplexity(Task):
    """Mean loss in nats, the logarithm of the perplexity, of Moby-Dick read through a window that slides by half.

    Window i is judged on its last half, the stretch right after that of window i - 1: so each token counts once, with
    half a window of text or more before it.
    """

    name = "perplexity"
    title = "sliding-window perplexity (in nats, its logarithm)"
    metric = "nll"
    query_aware = None
    one_pass = True
    spread = 0.2

    def samples(self, tokenizer, tokens: int, count: int, seed: int) -> list[Sample]:
        check_length(self.name, tokens)
        start, ids = start_token(tokenizer), whole(tokenizer)
        text = tokens - len(start)
        stride, places = text // 2, room(tokenizer, text) + 1
        first = sentence_start(tokenizer, ids, rng.python("perplexity", seed).randrange(places))
        windows = [(first + index * stride) % places for index in range(count)]
        return [
            Sample(
                id=f"{self.name}/{tokens}/{seed}/{index}",
                context=torch.tensor([start + list(ids[place : place + text - stride])]),
                continuation=torch.tensor([list(ids[place + text - stride : place + text])]),
                scored=slice(0, stride),
                one_pass=self.one_pass,
                facts={"index": index, "tokens": tokens, "text_start": place, "scored_tokens": stride},
            )
            for index, place in enumerate(windows)
        ]
