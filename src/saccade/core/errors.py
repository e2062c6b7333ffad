"""Every error a user can meet. Each says what was asked, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SaccadeError(Exception):
    """Asked / found / do. `found` is one sentence or a list of reasons.

    `exit_code` is what the command line ends with: 1 a check failed, 2 wrong usage, 3 cannot run here.
    """

    exit_code = 1

    def __init__(self, asked: str, found: str | Sequence[str] = (), do: str = ""):
        self.asked = asked
        self.found = [found] if isinstance(found, str) else list(found)
        self.do = do
        super().__init__(self._render())

    def __reduce__(self):
        return _again, (type(self), str(self), vars(self))  # to other processes, whatever a child's arguments are

    def _render(self) -> str:
        if len(self.found) == 1:
            text = f"{self.asked}: {self.found[0]}."
        else:
            text = self.asked + "".join(f"\n  - {reason}" for reason in self.found)
        if not self.do:
            return text
        return f"{text} {self.do}" if len(self.found) == 1 else f"{text}\n{self.do}"


def _again(kind: type[SaccadeError], text: str, parts: dict[str, object]) -> SaccadeError:
    """An error that came from another process."""
    error = kind.__new__(kind, text)
    vars(error).update(parts)
    return error


class UnknownName(SaccadeError, LookupError):
    """A method, task, model or option name that nobody knows. Says the nearest ones."""

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str], see: str):
        known = sorted(known)
        close = difflib.get_close_matches(name.replace("_", "-"), known, n=3, cutoff=0.5)
        close = close or [k for k in known if k.replace("-", "_") == name]
        meant = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
        super().__init__(f"no {kind} {name!r}", f"{len(known)} are known", f"{meant}{see}")
        self.close = close


class BadOption(SaccadeError, ValueError):
    """An option whose value cannot be used."""

    exit_code = 2


class BadBudget(BadOption):
    """A budget that is no budget: zero, above one, or of an unknown unit."""


class BadInput(SaccadeError, ValueError):
    """Tensors or text that cannot be used: wrong shape, NaN, empty."""

    exit_code = 2


class CannotRun(SaccadeError, RuntimeError):
    """A method that cannot run here, with every reason."""

    exit_code = 3


class DoesNotCompose(CannotRun):
    """Two methods that need the same part."""


class BadArtefact(SaccadeError, ValueError):
    """An artefact that is broken or was made for another model."""

    exit_code = 3


class ModelUnavailable(SaccadeError, RuntimeError):
    """A model that could not be fetched or read."""

    exit_code = 3


class CorruptResult(SaccadeError, ValueError):
    """A result file that cannot be read."""


class BugInSaccade(SaccadeError, AssertionError):
    """Our mistake, not the user's: please report it with the output of `saccade doctor`."""
