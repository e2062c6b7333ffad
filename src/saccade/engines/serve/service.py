"""The model at work for many: a bounded queue, one thread that owns the model, memory that is reserved beforehand."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from saccade.attach import caches
from saccade.core.budget import Budget
from saccade.core.errors import CannotRun, SaccadeError
from saccade.engines.serve.batch import Batch, Row, next_tokens
from saccade.engines.serve.jobs import Event, Job, Refused
from saccade.engines.serve.memory import Limits, Memory, costs
from saccade.engines.serve.prefixes import Prefixes
from saccade.engines.serve.prompts import Prompts, Reading
from saccade.measure.bytes import cache_bytes, full_cache_bytes
from saccade.measure.contestants import Contestant

log = logging.getLogger("saccade")

TRIAL_TOKENS = 64  # read at the start, to see what a token costs and what the cache allows
TRIAL_STEPS = 2  # and decoded after them: rows that grow ask for room, and some methods remember their choices
TURN_TOKENS = 512  # of whole prompts read between two steps of those that are being decoded; one prompt at least


class Service:
    """A context manager: inside, the methods are attached and the thread works."""

    def __init__(self, model: Any, tokenizer: Any, who: Contestant, budget: Budget, limits: Limits, seed: int = 0):
        self.model, self.tokenizer, self.who, self.budget, self.limits = model, tokenizer, who, budget, limits
        self.seed = seed
        self._ends = _end_tokens(model, tokenizer)
        self._waiting: deque[Job] = deque()
        self._readings: list[Reading] = []
        self._batches: list[Batch] = []
        self._taken: list[Job] = []  # which are read or decoded
        self._oldest = False  # whether the prompt read last was the one that waited longest
        self._ended = {"finished": 0, "cancelled": 0, "failed": 0}
        self._stopping = False
        self._news = threading.Condition()
        self._stack = contextlib.ExitStack()

    # --- on and off -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Service:
        with self._stack:
            self.positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            few = max(1, min(TRIAL_TOKENS, ((self.positions or 3 * TRIAL_TOKENS) - TRIAL_STEPS) // 2))
            dense = full_cache_bytes(self.model, 2 * few) - full_cache_bytes(self.model, few)
            self._run = self._stack.enter_context(self.who.working(self.model, self.budget, self.seed))
            self._prompts = Prompts(self.model, self._run)
            self._look(few, dense)
            self._thread = threading.Thread(target=self._work, name="saccade-serve", daemon=True)
            self._thread.start()
            self._stack.callback(self._stop)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _stop(self) -> None:
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    @torch.no_grad()
    def _look(self, few: int, dense: int) -> None:
        """What one token costs, while a prompt is read or after it, and what the cache allows. `dense`: bytes of a few
        tokens in the model's own cache."""
        held = {}
        for tokens in (few, 2 * few):
            cache, more = self._prompts.new_cache(), tokens + TRIAL_STEPS
            with self._prompts.one():
                self._prompts.read([0] * tokens, cache)
                held[tokens] = cache_bytes(cache)
            for seen in range(tokens, more):
                self._prompts.read([0] * (seen + 1), cache, seen)
            held[more] = cache_bytes(cache)
        self.not_joined = caches.why_not_joined(self._run, cache)
        padded = caches.pads(cache) and not self.not_joined
        self.memory = Memory(self.limits, self.positions, padded, *costs(held, few, TRIAL_STEPS, dense))
        self.not_continued = caches.why_not_continued(self._run, cache)
        self.not_in_pieces = caches.why_not_in_pieces(self._run, cache)
        self.chunk_tokens = 0 if self.not_in_pieces else self.limits.prefill_chunk
        caches.forget(cache)
        if self.memory.request_tokens < 2:
            raise CannotRun("serve requests of a token and an answer", self.memory.bound(), "Allow more.")
        most = 0 if self.not_continued else self.limits.prefixes
        self._prefixes = Prefixes(most, caches.observed_tokens(self._run))

    # --- from other threads -----------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Take a request on, or say why not.

        Raises:
            Refused: 400 for one that can never run here, 429 when the queue is full, 503 when it is closing.
        """
        self.memory.measure(job)
        with self._news:
            if self._stopping:
                raise Refused("serve a request", "the server is closing", "Ask another one.", status=503)
            if len(self._waiting) >= self.limits.queue:
                found = f"{len(self._waiting)} requests are waiting already"
                raise Refused("serve a request", found, "Ask again in a moment.", status=429, code="queue_full")
            self._waiting.append(job)
            self._news.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any longer."""
        job.cancelled = True

    def notes(self) -> list[str]:
        """What does not work here as elsewhere, in words."""
        notes = [f"Each request is decoded by itself: {'; '.join(self.not_joined)}."] if self.not_joined else []
        if self.not_in_pieces and self.limits.prefill_chunk:
            notes.append(f"Who is being answered waits while a prompt is read: {'; '.join(self.not_in_pieces)}.")
        if self.not_continued and self.limits.prefixes:
            notes.append(f"No prompt is reused: {'; '.join(self.not_continued)}.")
        ignored = _unserved(self.model)
        if ignored:
            notes.append(f"The model's own generation settings {', '.join(ignored)} are not applied.")
        return notes

    def health(self) -> dict[str, Any]:
        """Where it stands."""
        with self._news:
            prefixes = self._prefixes
            return {
                "status": "closing" if self._stopping else "ok",
                "method": self.who.label,
                "budget": str(self.budget) if self.who.methods else "1",
                "running": len(self._taken),
                "waiting": len(self._waiting),
                "ended": dict(self._ended),
                "batching": {"most": self.limits.batch, "together": not self.not_joined, "why_not": self.not_joined},
                "prefill": {"chunk_tokens": self.chunk_tokens, "reading": len(self._readings),
                            "why_not": self.not_in_pieces},
                "memory": {
                    "bytes_reserved": self.memory.reserved(self._taken),
                    "bytes_prefixes": prefixes.bytes_held,
                    "bytes_most": self.limits.cache_bytes,
                    "bytes_per_token": self.memory.bytes_per_token,
                    "bytes_per_request": self.memory.bytes_per_request,
                    "request_tokens": self.memory.request_tokens,
                },
                "prefixes": {
                    "kept": len(prefixes),
                    "most": prefixes.most,
                    "hits": prefixes.hits,
                    "reused_tokens": prefixes.reused_tokens,
                    "why_not": self.not_continued,
                },
            }

    # --- in the thread ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _work(self) -> None:
        while self._something_to_do():
            try:
                self._turn()
            except Exception as error:  # while rows joined or left: it concerns all that are there, not the server
                self._fail(list(self._taken), error)
                self._set(None, [])
                self._readings = []
        self._close()

    def _turn(self) -> None:
        """Some of the prompts, and everybody's next token."""
        self._drop_cancelled()
        self._admit()
        fresh = self._read()
        if fresh:
            self._join(fresh)
        for batch in list(self._batches):
            self._step(batch)

    def _something_to_do(self) -> bool:
        with self._news:
            while not (self._stopping or self._waiting or self._readings or self._batches):
                self._news.wait()
            return not self._stopping

    def _close(self) -> None:
        error = Refused("serve a request", "the server is closing", "Ask another one.", status=503)
        with self._news:
            jobs = [*self._waiting, *self._taken]
            self._waiting.clear()
            self._taken.clear()
        for job in jobs:
            job.deliver(Event(error=error))
        self._set(None, [])
        self._readings = []

    def _drop_cancelled(self) -> None:
        with self._news:
            left = deque(job for job in self._waiting if not job.cancelled)
            self._ended["cancelled"] += len(self._waiting) - len(left)
            self._waiting = left
        self._release([r.job for r in self._readings if r.job.cancelled], "cancelled")
        self._readings = [r for r in self._readings if not r.job.cancelled]
        for batch in list(self._batches):
            self._keep(batch, [row for row in batch.rows if not row.job.cancelled], "cancelled")

    def _admit(self) -> None:
        """Take on those that waited longest, as far as rows and memory go."""
        while len(self._taken) < self.limits.batch:
            job = self._next()
            if job is None:
                break
            self._readings.append(Reading(job))

    def _next(self) -> Job | None:
        with self._news:
            job = self._waiting[0] if self._waiting else None
            if job is None or self.memory.room([*self._taken, job]) < 0:
                return None
            self._taken.append(self._waiting.popleft())
            self._prefixes.shrink(self.memory.room(self._taken))
            return job

    def _read(self) -> list[Batch]:
        """As much of the prompts as goes between two steps; those that are read are batches of their own."""
        fresh, room = [], self.chunk_tokens or TURN_TOKENS
        while self._readings and room > 0:
            reading = self._whose_turn()
            before = reading.read
            batch = self._begin(reading, room if self.chunk_tokens else reading.left)
            room -= reading.read - before
            if batch is not None:
                fresh.append(batch)
        return fresh

    def _whose_turn(self) -> Reading:
        """Turn and turn about who waited longest and who has least to read: neither holds the other up for long."""
        self._oldest = not self._oldest
        return self._readings[0] if self._oldest else min(self._readings, key=lambda r: r.left)

    def _begin(self, reading: Reading, most: int) -> Batch | None:
        """Read so many tokens of a prompt, and write its first one after the last; None before that, if that was all,
        or if it failed."""
        try:
            logits = self._prefill(reading, most)
            if reading.left:
                return None
            self._readings.remove(reading)
            batch = Batch(self.model, reading.cache, Row(reading.job, self.tokenizer))
            return batch if self._hand_out(batch, next_tokens(logits, batch.rows)) else None
        except Exception as error:  # of a method, the model or the device: it concerns this request, not the server
            self._readings = [r for r in self._readings if r is not reading]
            self._fail([reading.job], error)
            return None

    def _prefill(self, reading: Reading, most: int) -> torch.Tensor:
        job, known = reading.job, self._opened(reading)
        until = min(len(job.ids), known + most)
        reading.known, reading.read = until, reading.read + until - known
        if until < len(job.ids):
            with self._prompts.one(ends=False, tokens=len(job.ids)):
                return self._prompts.read(job.ids[:until], reading.cache, known)
        if not self._prefixes.most:
            return self._prompts.read(job.ids, reading.cache, known)
        with self._prompts.one():
            logits = self._prompts.read(job.ids, reading.cache, known)
            with self._news:
                self._prefixes.keep(job.ids, reading.cache, self.memory.room(self._taken))
        return logits

    def _opened(self, reading: Reading) -> int:
        """See to a cache, which may hold the beginning already, and to it that the run knows that this one is read on;
        tokens that it holds."""
        if reading.cache is None:
            with self._news:
                reading.cache, reading.known = self._prefixes.find(reading.job.ids)
            reading.job.reused_tokens = reading.known
        if reading.cache is None:
            reading.cache = self._prompts.new_cache()
        caches.resume(reading.cache)
        return reading.known

    def _join(self, fresh: Sequence[Batch]) -> None:
        """Those that were read join those that are decoded, where the cache allows it."""
        if self.not_joined:
            self._set(None, [*self._batches, *fresh])
            return
        first, *others = [*self._batches, *fresh]
        first.take_in(others)
        self._set(None, [first])

    def _step(self, batch: Batch) -> None:
        jobs = [row.job for row in batch.rows]
        try:
            self._hand_out(batch, batch.step())
        except Exception as error:
            self._fail(jobs, error)
            self._set(batch, [])

    def _hand_out(self, batch: Batch, tokens: torch.Tensor) -> bool:
        """Give every row its new token, and its client the text; whether some rows go on."""
        told = [(row, row.take(token, self._ends)) for row, token in zip(batch.rows, tokens.tolist())]
        self._keep(batch, [row for row, event in told if not event.last], "finished")
        for row, event in told:  # last of all, so that who is told the end finds the memory free
            if event.text or event.last:
                row.job.deliver(event)
        return bool(batch.rows)

    def _keep(self, batch: Batch, rows: Sequence[Row], why: str) -> None:
        """Of a batch only these go on; why the others do not."""
        left = [row.job for row in batch.rows if row not in rows]
        batch.keep(rows)
        if not rows:
            self._set(batch, [])
        self._release(left, why)

    def _set(self, old: Batch | None, new: list[Batch]) -> None:
        """In the place of one batch, or of all, these."""
        with self._news:
            self._batches = new if old is None else [*(b for b in self._batches if b is not old), *new]

    def _release(self, jobs: Sequence[Job], why: str) -> None:
        with self._news:
            self._taken = [job for job in self._taken if job not in jobs]
            self._ended[why] += len(jobs)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        log.error("serving failed", exc_info=error)
        self._release(jobs, "failed")
        for job in jobs:
            job.deliver(Event(error=_said(error)))


def _said(error: Exception) -> Refused:
    """What a client is told: our own errors in full, of others no more than their kind."""
    if isinstance(error, SaccadeError):
        return Refused(error.asked, error.found, error.do)
    if isinstance(error, torch.OutOfMemoryError):
        return Refused("serve a request", "the device is out of memory", "Ask again, or for fewer tokens.", status=503)
    found = f"the model failed with a {type(error).__name__}"
    return Refused("serve a request", found, "The server's log says more.", status=500)


def _unserved(model: Any) -> list[str]:
    """Settings in the model's folder by which `generate` would choose other tokens, and we do not."""
    neutral = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": None,
               "begin_suppress_tokens": None, "sequence_bias": None, "min_new_tokens": 0, "min_length": 0}  # fmt: skip
    said = {name: getattr(model.generation_config, name, None) for name in neutral}
    return [f"{name}={value}" for name, value in said.items() if value not in (None, neutral[name])]


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Where the model stops, as `generate` does."""
    said = getattr(model.generation_config, "eos_token_id", None)
    said = tokenizer.eos_token_id if said is None else said
    return frozenset([] if said is None else [said] if isinstance(said, int) else said)
