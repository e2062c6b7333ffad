"""Score one contestant on the samples of one task, and see what it kept, computed and held meanwhile."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.attach import Run
from saccade.attach.compat import CACHE
from saccade.attach.probe import Found, probe
from saccade.core.budget import Budget
from saccade.core.errors import BadInput
from saccade.core.record import LayerRecord, Record
from saccade.measure.bytes import cache_bytes, full_cache_bytes
from saccade.measure.contestants import Contestant

WARMUP_TOKENS = 64
BATCH_TOKENS = 2048  # that go through the model together
BINS = 64  # of the picture of what was kept
READ_TOKENS = 64  # after the prompt, whose reading is drawn
ASKED_TOKENS = 48  # end of the prompt that is shown beside a wrong answer


@dataclass(frozen=True)
class Passed:
    """Logits of the continuation, how long they took, and what the cache held when the context had been read."""

    logits: Float[Tensor, "b m vocab"]
    seconds_prefill: float
    seconds_decode: float = 0.0
    bytes_held: int | None = None
    kept_fraction: float | None = None
    picture: dict[str, Any] | None = None


class Subject:
    """A model with its tokenizer; remembers what need not be found out anew for every cell: what a probe sees in it,
    how large its own cache is at a length, and who is warm, after how many seconds."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.get_input_embeddings().weight.device
        self.warm: dict[tuple[str, bool], float] = {}
        self.full_bytes = functools.lru_cache(functools.partial(full_cache_bytes, model))

    @functools.cached_property
    def found(self) -> Found:
        """By one probe: the model stays as it is."""
        return probe(self.model)

    def text(self, ids: Tensor) -> str:
        """Tokens as text."""
        return self.tokenizer.decode(ids.tolist())


def quality(
    subject: Subject, who: Contestant, budget: Budget, task: Any, samples: Sequence[Any], seed: int, again: bool = False
) -> dict[str, Any]:
    """The measured part of a quality cell's line.

    again: in reverse order and one row at a time, which changes nothing but rounding: the noise of the machine.
    """
    outcomes: dict[str, dict[str, Any]] = {}
    kept, what, whole = None, shown(who), _whole_caches(subject, samples)  # counted before anything is attached
    with who.working(subject.model, budget, seed, subject.found) as run, torch.no_grad():
        warmup = _warm_up(subject, who, samples[0])
        for rows in ([s] for s in reversed(samples)) if again else _together(samples):
            passed = forward(subject, rows, run, draw=what if kept is None and what != "read" else None)
            kept = kept or passed.picture
            for i, sample in enumerate(rows):
                outcomes[sample.id] = _outcome(subject, task, sample, passed, i, len(rows)) | _densities(run, sample)
        back_ends = run.record.back_ends if run else []
        if what == "read" and not samples[0].one_pass:
            kept = _reading(subject, samples[0], run)
    ordered = [outcomes[s.id] | whole[s.id] for s in samples]
    return {
        "method": who.names,
        "part": who.part,
        "baseline": who.baseline,
        "samples": ordered,
        "achieved": {name: _mean([o[name] for o in ordered if o.get(name) is not None]) for name in ACHIEVED},
        "seconds_warmup": warmup,
        "back_ends": back_ends,
        "kept": kept,
    }


ACHIEVED = ("kept_fraction", "prefill_density", "decode_density", "bytes_held", "bytes_full")


def _whole_caches(subject: Subject, samples: Sequence[Any]) -> dict[str, dict[str, int]]:
    sizes = {s.id: s.context.shape[1] for s in samples if not s.one_pass}
    return {s.id: {"bytes_full": subject.full_bytes(sizes[s.id])} if s.id in sizes else {} for s in samples}


def _together(samples: Sequence[Any]) -> Iterator[list[Any]]:
    """Samples of one shape, as many rows as BATCH_TOKENS: short ones leave cores idle and pay every call alone."""
    waiting: dict[tuple[int, int], list[Any]] = {}
    for sample in samples:
        shape = (sample.context.shape[1], sample.continuation.shape[1])
        rows = waiting.setdefault(shape, [])
        rows.append(sample)
        if (len(rows) + 1) * sum(shape) > BATCH_TOKENS:
            yield waiting.pop(shape)
    yield from waiting.values()


# --- one pass ---------------------------------------------------------------------------------------------------------


def forward(subject: Subject, rows: Sequence[Any], run: Run | None, draw: What | None = None) -> Passed:
    """Samples of one shape through the model. One pass where they say so; else context first, then the continuation
    in one forward on that cache, which gives the same as token by token. `draw`: the picture to be made in between."""
    context = torch.cat([s.context for s in rows]).to(subject.device)
    continuation = torch.cat([s.continuation for s in rows]).to(subject.device)
    if rows[0].one_pass:
        return _one_pass(subject, context, continuation)
    return _two_stages(subject, context, continuation, run, draw)


def _one_pass(subject: Subject, context: Int[Tensor, "b n"], continuation: Int[Tensor, "b m"]) -> Passed:
    ids = torch.cat([context, continuation], 1)
    start = clock(subject.device)
    out = subject.model(ids, use_cache=False, logits_to_keep=continuation.shape[1] + 1)
    return Passed(out.logits[:, :-1], clock(subject.device) - start)


def _two_stages(
    subject: Subject, context: Int[Tensor, "b n"], continuation: Int[Tensor, "b m"], run: Run | None, draw: What | None
) -> Passed:
    start = clock(subject.device)
    first = subject.model(context, use_cache=True, logits_to_keep=1)
    seconds_prefill = clock(subject.device) - start
    cache, logits = first[CACHE], first.logits
    held, kept = cache_bytes(cache), run.record.kept_fraction if run else 1.0
    drawn = picture(run.record, draw, context.shape[1]) if run and draw else None
    start = clock(subject.device)
    if continuation.shape[1] > 1:
        rest = subject.model(continuation[:, :-1], **{CACHE: cache}, use_cache=True)
        logits = torch.cat([logits, rest.logits], 1)
    return Passed(logits, seconds_prefill, clock(subject.device) - start, held, kept, drawn)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _warm_up(subject: Subject, who: Contestant, sample: Any) -> float:
    """Seconds of this contestant's first, short forward in this process: what is loaded, compiled or allocated only
    once is not timed with the rest."""
    key = who.label, sample.one_pass
    if key not in subject.warm:
        ids = torch.cat([sample.context, sample.continuation], 1)[:, :WARMUP_TOKENS].to(subject.device)
        start = clock(subject.device)
        subject.model(ids, use_cache=not sample.one_pass, logits_to_keep=1)
        subject.warm[key] = round(clock(subject.device) - start, 4)
    return subject.warm[key]


# --- what came of it --------------------------------------------------------------------------------------------------


def _outcome(subject: Subject, task: Any, sample: Any, passed: Passed, row: int, rows: int) -> dict[str, Any]:
    logits = passed.logits[row].float().cpu()
    score = float(task.score(logits, sample))
    if not math.isfinite(score):
        raise BadInput(f"sample {sample.id}", f"its score is {score}", "The method or the model made NaN or infinity.")
    out = {"id": sample.id, "facts": dict(sample.facts), "score": score}
    if task.metric == "hit":
        out |= _answer(subject, logits, sample)
    if not sample.one_pass:
        out |= {"bytes_held": passed.bytes_held // rows, "kept_fraction": round(passed.kept_fraction, 6)}
    times = {"seconds_prefill": passed.seconds_prefill / rows, "seconds_decode": passed.seconds_decode / rows}
    return out | {name: round(value, 5) for name, value in times.items()}


def _answer(subject: Subject, logits: Float[Tensor, "m vocab"], sample: Any) -> dict[str, str]:
    said, expected = logits[sample.scored].argmax(-1), sample.continuation[0, sample.scored]
    asked = sample.context[0, -ASKED_TOKENS:]
    return {"asked": subject.text(asked), "expected": subject.text(expected), "said": subject.text(said)}


def _densities(run: Run | None, sample: Any) -> dict[str, float]:
    stages = ("prefill",) if sample.one_pass else ("prefill", "decode")
    record = run.record if run else Record()
    return {f"{stage}_density": round(record.density(stage), 6) for stage in stages}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- the picture ------------------------------------------------------------------------------------------------------

# of each token: whether it is stored; how many bits are held of it, of those of the model's precision; or how many of
# the queries after the prompt read it
What = Literal["kept", "bits", "read"]


def shown(who: Contestant) -> What | None:
    """What a picture of this one shows: of several parts the one that the others are seen in too. None: it has a part
    in the prompt's own attention and in nothing behind it."""
    drawn: dict[str, What] = {"decode": "read", "pack": "bits", "evict": "kept"}
    return next((what for part, what in drawn.items() if part in who.parts), None)


def picture(record: Record, what: What, seen: int) -> dict[str, Any]:
    """Of the first sequence: per layer and head, the mean over each of 64 stretches of a text of `seen` tokens."""
    layers = sorted(record.layers.values(), key=lambda layer: layer.layer)
    share = [[_stretches(*head, seen) for head in _heads(layer, what, seen)] for layer in layers]
    return {"what": what, "seen": seen, "bits": layers[0].bits_whole or None, "share": share}


def _heads(layer: LayerRecord, what: What, seen: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of each head, and what is shown of them, from 0 to 1."""
    if what == "read":
        for read in layer.reads[0][:, :seen]:
            yield torch.arange(len(read)), read / layer.readers[0]
        return
    for i, positions in enumerate(layer.kept[0]):
        yield positions, layer.bits[0][i] / layer.bits_whole if what == "bits" else torch.ones(len(positions))


def _stretches(positions: Int[Tensor, " kept"], shares: Float[Tensor, " kept"], seen: int) -> list[float]:
    bins = min(BINS, seen)
    held = torch.bincount(positions.long() * bins // seen, shares.double(), minlength=bins)
    there = torch.bincount(torch.arange(seen) * bins // seen, minlength=bins)
    return [round(float(x), 2) for x in held / there]


@torch.no_grad()
def _reading(subject: Subject, sample: Any, run: Run) -> dict[str, Any]:
    """What the tokens after the context read of it. A pass of its own: no clock runs while masks are summed."""
    context, rest = (x.to(subject.device) for x in (sample.context, sample.continuation[:, :READ_TOKENS]))
    run.note_reads = True
    cache = subject.model(context, use_cache=True, logits_to_keep=1)[CACHE]
    subject.model(rest, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    run.note_reads = False
    return picture(run.record, "read", context.shape[1])
