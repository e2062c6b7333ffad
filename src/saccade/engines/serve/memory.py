"""How much memory the caches of requests come to take, and so how many tokens one may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saccade.core.errors import BadOption
from saccade.engines.serve.jobs import Job, Refused


@dataclass(frozen=True)
class Limits:
    """What the service takes on. `request_tokens` None: as many as the model has positions.

    Raises:
        BadOption: a number below one (`prefixes`, `prefill_chunk`: below zero).
    """

    batch: int = 16  # requests decoded together
    queue: int = 64  # requests that wait
    cache_bytes: int = 4 * 2**30  # of all caches, those kept for later prompts included
    prefixes: int = 8  # prompts whose caches are kept
    new_tokens: int = 256  # where a request does not say how many
    request_tokens: int | None = None  # prompt and new ones of one request
    prefill_chunk: int = 512  # tokens of a prompt that are read between two steps of the others; 0: all of it

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("prefixes", "prefill_chunk") else 1
            if value is not None and value < least:
                raise BadOption(f"{name}={value}", f"it must be {least} or more", "Give such a number.")


def costs(held: Mapping[int, int], few: int, more: int, dense: int) -> tuple[int, int]:
    """Bytes of each token, and of a request beside its tokens.

    held: bytes of caches of a `few` tokens and of twice as many, and of `more` tokens decoded after each
    dense: of a few tokens in the model's own cache, the least that is reckoned with: some methods evict while they read
    """
    grown = max(held[n + few] - held[n] for n in (few, few + more))
    each = -(-max(dense, grown) // few)
    return each, max(0, *(size - n * each for n, size in held.items()))


@dataclass(frozen=True)
class Memory:
    """What is reckoned with. `positions`: those of the model, None: any number; `padded`: rows that are decoded
    together take as much as the largest of them."""

    limits: Limits
    positions: int | None
    padded: bool
    bytes_per_token: int
    bytes_per_request: int

    @property
    def request_tokens(self) -> int:
        """Prompt and new tokens that one request may have: by option, by the model's positions, by memory."""
        room = max(0, self.limits.cache_bytes - self.bytes_per_request) // self.bytes_per_token
        return min(x for x in (self.limits.request_tokens, self.positions, room) if x is not None)

    def measure(self, job: Job) -> None:
        """Settle how many tokens a request may write, and what memory that takes.

        Raises:
            Refused: it can never run here.
        """
        prompt, limit, asked = len(job.ids), self.request_tokens, job.wish.new_tokens
        if not prompt:
            raise Refused("serve a request", "its prompt has no tokens", "Give some text.")
        job.new_tokens = min(self.limits.new_tokens, max(1, limit - prompt)) if asked is None else asked
        if prompt + job.new_tokens > limit:
            raise Refused(
                f"read {prompt:,} tokens and write {job.new_tokens:,}",
                self.bound(),
                "Send a shorter prompt or ask for fewer new tokens.",
                code="context_length_exceeded",
            )
        job.bytes_reserved = (prompt + job.new_tokens) * self.bytes_per_token + self.bytes_per_request

    def bound(self) -> str:
        """Why a request is too long."""
        limit = self.request_tokens
        if limit == self.positions:
            return f"this model has {limit:,} positions"
        if limit == self.limits.request_tokens:
            return f"this server takes {limit:,} tokens a request"
        size, each, once = self.limits.cache_bytes, self.bytes_per_token, self.bytes_per_request
        return f"the {size:,} bytes for caches hold {limit:,} tokens of {each:,} bytes, beside {once:,} for a request"

    def reserved(self, jobs: Sequence[Job]) -> int:
        """Bytes that some jobs may come to take together."""
        sizes = [job.bytes_reserved for job in jobs]
        return len(sizes) * max(sizes, default=0) if self.padded else sum(sizes)

    def room(self, jobs: Sequence[Job]) -> int:
        """Bytes that these jobs leave; below zero, they are too many."""
        return self.limits.cache_bytes - self.reserved(jobs)
