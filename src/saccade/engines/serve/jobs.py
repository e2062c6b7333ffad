"""A request on its way through the service, and what it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from saccade.core.errors import SaccadeError


class Refused(SaccadeError):
    """A request that is not served, with the HTTP status and OpenAI's names for the kind of error."""

    def __init__(self, asked: str, found: str | list[str], do: str = "", *, status: int = 400, param: str | None = None,
                 code: str | None = None):  # fmt: skip
        super().__init__(asked, found, do)
        self.status, self.param, self.code = status, param, code

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


@dataclass(frozen=True)
class Wish:
    """How to go on from a prompt. `new_tokens` None: as many as the server says. Temperature 0 takes the likeliest."""

    new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """More text; or the end, with the reason ("stop", "length"); or what went wrong."""

    text: str = ""
    finish: str | None = None
    error: Refused | None = None

    @property
    def last(self) -> bool:
        """Nothing comes after it."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """One prompt. `deliver` is called from the thread that owns the model; set `cancelled` to have it stop."""

    ids: list[int]
    wish: Wish
    deliver: Callable[[Event], None]
    new_tokens: int = 0  # how many it may write, once admitted
    bytes_reserved: int = 0
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)  # written so far
    reused_tokens: int = 0  # of the prompt, read for an earlier request
