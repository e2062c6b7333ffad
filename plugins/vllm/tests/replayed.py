"""What a real vLLM did, layer by layer, against the library's own engine.

Texts alone do not tell whether a method is at work as it should be. A method that chooses takes what is worth most;
where two choices are worth the same but for rounding, vLLM and the library choose differently and write on differently,
both rightly. So every layer of the library is given the queries, keys and values that this layer had in vLLM, and hands
on what it answered in vLLM: rounding does not grow from layer to layer, and no choice follows from another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import saccade

# Of the largest value beside it: half of the digits. Between vLLM and the library there were 3e-5 at most in what
# layers are given, and 3e-6 in what they answer; a block that moba chose otherwise moved what the next layer was given
# by 1e-3
ROUNDING = torch.finfo(torch.float32).eps ** 0.5
# The share of answers, one for each head and query, that may be others: here there was none, and by another seed or
# budget more than eight in ten. One wrong layer in thirty is more, and one wrong query in three hundred
TIES = 1e-3


class Recorder:
    """Notes what each layer is given and answers from now on: `steps[prompt][step][layer]` is q, k, v and out."""

    def __init__(self, works: Sequence[Any], prompts: Sequence[list[int]]):
        self.numbers = {len(prompt): i for i, prompt in enumerate(prompts)}
        assert len(self.numbers) == len(prompts), "a prompt is known by its length"
        self.steps: list[list[list[tuple[Tensor, ...]]]] = [[] for _ in prompts]
        self.whose: dict[tuple[int, int], int] = {}  # layer and first block -> number of the prompt
        for work in works:
            work.attend = functools.partial(self._attend, work.here.layer, work.attend)

    def _attend(self, layer: int, attend: Any, q: Tensor, k: Tensor, v: Tensor, rows: Any, out: Tensor) -> None:
        attend(q, k, v, rows, out)
        for row in rows:
            if row.prompt:
                self.whose[layer, row.first_block] = self.numbers[row.seen]
            steps = self.steps[self.whose[layer, row.first_block]]
            if layer == 0:
                steps.append([])
            new = (x[row.start : row.stop].transpose(0, 1)[None].to("cpu", copy=True) for x in (q, k, v, out))
            steps[-1].append(tuple(new))


def replay(model: Any, settings: Any, prompt: list[int], tokens: list[int], steps: Sequence[Any]) -> dict[str, float]:
    """The same text read by the library under a method.

    given: the largest difference of queries, keys and values. prompt, later: the share of answers that are others, to
    queries of the prompt and after it. behind: see there
    """
    assert len(steps) == len(tokens) and {len(step) for step in steps} == {model.config.num_hidden_layers}
    given, off, logits = [], [[] for _ in tokens], []
    ends = torch.tensor(model.generation_config.eos_token_id).view(-1)

    def forward(engine: Any, own: Any, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Any) -> Tensor:
        step = len(logits)
        *there, out = steps[step][engine.place.layer]
        given.extend(float((a - b).abs().max() / b.abs().max()) for a, b in zip((q, k, v), there))
        difference = (own(layer, *there, real) - out).abs().amax(-1) / out.abs().max()
        off[step].append(~(difference <= ROUNDING))  # NaN is off
        return out

    with torch.no_grad(), saccade.attach(model, settings.method, budget=settings.budget, seed=settings.seed) as run:
        for engine in run._engines.values():
            engine.forward = functools.partial(forward, engine, engine.forward)
        cache = run.new_cache()
        for ids in [prompt, *([token] for token in tokens[:-1])]:
            said = model(torch.tensor([ids]), past_key_values=cache).logits[0, -1]
            logits.append(said.index_fill(0, ends, -torch.inf))  # no text may end before its last token
    first, later = torch.stack(off[0]), torch.stack([x for some in off[1:] for x in some])
    shares = {"prompt": float(first.float().mean()), "later": float(later.float().mean())}
    return {"given": float(torch.tensor(given).max()), **shares, "behind": behind(torch.stack(logits), tokens)}


def behind(logits: Tensor, tokens: Sequence[int]) -> float:
    """How far the tokens lie behind the best of the logits [n v] at most, by the largest logit; 0: they are best."""
    mine = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    largest = logits.masked_fill(logits.isinf(), 0).abs().amax(-1)
    return float(((logits.amax(-1) - mine) / largest).max())


def parting(logits: Tensor, tokens: Sequence[int]) -> float:
    """The same of a text beside the one that the library writes by itself, which counts up to where the two part."""
    other = (logits.argmax(-1) != torch.tensor(tokens)).nonzero()[:, 0].tolist()
    until = other[0] + 1 if other else len(tokens)
    return behind(logits[:until], tokens[:until])


def assert_as_in_the_library(found: dict[str, Any]) -> None:
    """Of every prompt: the same but for rounding."""
    for one in found["replayed"]:
        assert one["given"] <= ROUNDING and one["behind"] <= ROUNDING, one
        assert one["prompt"] <= TIES and one["later"] <= TIES, one
