"""Reading tokens under a method, which pairs were computed then, and how far two results may differ."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from saccade.attach import compat
from saccade.attach.compat import CACHE
from saccade.core.selection import causal_mask
from tests.conformance.cases import LAYERS, Trial
from tests.helpers import TIMES, error, rounding
from tests.methods.handmade import in_pieces, tokens


def read(trial: Trial, ids: Tensor, cuts: Sequence[int] = (), **changes: Any) -> Tensor:
    """Logits under the method, attached for this only. The prompt ends where the trial says, or at the first cut."""
    with trial.attach(**changes):
        return in_pieces(trial.model, ids, list(cuts) or [trial.prompt])


@contextlib.contextmanager
def kernel(model: Any, name: str) -> Iterator[None]:
    """The model's own attention by another of transformers' functions: "sdpa" or "eager"."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def own(model: Any, ids: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    """What the model gives without us by both of PyTorch's ways, and in pieces: the same but for rounding."""
    out = []
    for name in ("sdpa", "eager"):
        with kernel(model, name), torch.no_grad():
            out += [model(ids, use_cache=False).logits, in_pieces(model, ids, list(cuts))]
    return out


def assert_same(actual: Tensor, expected: Tensor, trial: Trial, what: str = "logits") -> None:
    """Equal but for rounding: at most twice what PyTorch's own ways of one dense forward differ in that precision."""
    theirs, ours = _differ(trial.model, trial.prompt, trial.rest), error(actual, expected)
    assert ours <= TIMES * theirs, f"{what}: {ours:.3g}, PyTorch {theirs:.3g}"


@functools.cache  # methods meet the same examples
def _differ(model: Any, prompt: int, rest: int) -> float:
    """How far PyTorch's own ways of one dense forward lie apart, and no less than one rounding."""
    ways = own(model, tokens(prompt + rest), [prompt])
    return max([error(way, ways[0]) for way in ways[1:]] + [rounding(ways[0], ways[0].dtype)])


# --- what was computed ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Watched:
    """Of one sequence: logits, and per layer the pairs [1 h n n] that were computed and the positions held per head."""

    logits: Tensor
    masks: list[Tensor]
    held: list[list[Tensor]]
    record: Any


def watch(trial: Trial, ids: Tensor | None = None) -> Watched:
    """Read prompt and rest, each in one forward, and note every answer of the method's `select` and `visible`. Where
    every token decides what goes, the rest is read token by token, and what is held before each is noted.
    """
    ids, n = trial.ids() if ids is None else ids, trial.prompt
    weighing = getattr(trial.method, "weighing", False)
    with trial.attach() as run, _listening(type(trial.method)) as heard, torch.no_grad():
        first = trial.model(ids[:, :n], use_cache=True)
        logits, held, heard_prompt = [first.logits], [], heard[:]
        heard.clear()
        for part in ids[:, n:].split(1 if weighing else ids.shape[1], 1):
            held.append([run.record.layers[layer].kept[0] for layer in range(LAYERS)])
            logits.append(trial.model(part, **{CACHE: first[CACHE]}, use_cache=True).logits)
        masks = [_pairs(trial, layer, [h[layer] for h in held], heard_prompt, heard) for layer in range(LAYERS)]
        return Watched(torch.cat(logits, 1), masks, held[0], run.record)


@contextlib.contextmanager
def _listening(cls: type) -> Iterator[list[tuple[Any, Any]]]:
    """(site, selection) or (site, (query positions, key positions, heads, answer)), in the order they were given."""
    heard: list[tuple[Any, Any]] = []

    def select(self, q, k, site):
        heard.append((site, plain["select"](self, q, k, site)))
        return heard[-1][1]

    def visible(self, q_position, k_position, head, site):
        out = plain["visible"](self, q_position, k_position, head, site)
        heard.append((site, (q_position, k_position, head, out)))
        return out

    plain = {name: getattr(cls, name) for name in ("select", "visible") if hasattr(cls, name)}
    spies = {"select": select, "visible": visible}
    with contextlib.ExitStack() as stack:
        for name in plain:
            stack.enter_context(mock.patch.object(cls, name, spies[name]))
        yield heard


def _pairs(trial: Trial, layer: int, held: list[list[Tensor]], prompt: list, rest: list) -> Tensor:
    """Causal, but for what the method said otherwise: in the prompt, by what it kept, and in what came after. `held` is
    what each head held at the end of the prompt, or before each token after it."""
    n, end, heads = trial.prompt, trial.prompt + trial.rest, trial.heads[0]
    group = heads // trial.heads[1]
    out = causal_mask(end, end).repeat(1, heads, 1, 1)
    for selection in _selections(prompt, layer, "prefill"):
        out[..., :n, :n] = selection.mask()
    for head in range(heads):
        starts = range(n, end) if len(held) > 1 else [n]
        for start, heads_held in zip(starts, held):
            stored = torch.cat([heads_held[head // group].long(), torch.arange(start, end)])
            forgotten = torch.ones(end, dtype=torch.bool).scatter(0, stored, False)
            out[:, head, start:, forgotten] = False
        for selection in _selections(rest, layer, "decode"):
            out[:, head, n:, stored] &= selection.mask().expand(1, heads, -1, -1)[:, head]
    for site, (at, positions, rows, answer) in _answers(rest, layer):
        if answer is None or at.shape[1] != trial.rest or site.queries != trial.rest:
            continue  # asked by the eviction after the forward, about the next query
        for row, kept, seen in zip(rows.tolist(), positions.long(), answer):
            out[:, row * group : (row + 1) * group, n:, kept] &= seen
    return out


def _selections(heard: list, layer: int, stage: str) -> list:
    return [s for site, s in heard if site.layer == layer and site.stage == stage and hasattr(s, "mask")]


def _answers(heard: list, layer: int) -> list:
    return [(site, a) for site, a in heard if site.layer == layer and isinstance(a, tuple)]


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Padded:
    """Rows of different lengths side by side, with padding on one side, and the positions that go with it."""

    ids: Tensor
    real: Tensor
    position: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor], side: str) -> Padded:
        """Rows [n] of any length, also none."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), 5)  # a word like any other: only the mask may tell
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place], real[i, place] = row, True
        return cls(ids, real, (real.long().cumsum(-1) - 1).clamp(min=0))


def read_padded(model: Any, prompts: Sequence[Tensor], rests: Sequence[Tensor], side: str) -> list[Tensor]:
    """Logits of each row's real tokens: prompts padded on one side, then the rests (of one length) on that cache."""
    first, more = Padded.of(prompts, side), torch.stack(list(rests))
    lengths = torch.tensor([len(p) for p in prompts])[:, None]
    cache = compat.new_cache(model)
    with torch.no_grad():
        out = model(first.ids, attention_mask=first.real.long(), position_ids=first.position, **{CACHE: cache})
        whole = torch.cat([first.real, torch.ones_like(more, dtype=torch.bool)], 1).long()
        where = lengths + torch.arange(more.shape[1])
        after = model(more, attention_mask=whole, position_ids=where, **{CACHE: cache})
    return [torch.cat([a[r], b])[None] for a, r, b in zip(out.logits, first.real, after.logits)]
