"""From tokens to text as it comes: never half a letter, nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what a tokenizer puts where bytes are missing


class Text:
    """Grows token by token; each call gives what may be shown now."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self._tokens: list[int] = []
        self._context, self._shown = 0, 0  # tokens from `_context` are decoded again: words join on to what is shown
        self._held = ""  # may be the beginning of a stop string

    def add(self, token: int) -> str:
        """One more token."""
        self._tokens.append(token)
        new = self._undecoded()
        if not new or new.endswith(HALF):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return self._release(new)

    def end(self) -> str:
        """What was held back, but for half a letter."""
        text = "" if self.stopped else self._release(self._undecoded().rstrip(HALF)) + self._held
        self._held = ""
        return text

    def _undecoded(self) -> str:
        before, now = self._decode(self._context, self._shown), self._decode(self._context, len(self._tokens))
        return now[len(before) :]

    def _decode(self, first: int, last: int) -> str:
        tokens = self._tokens[first:last]
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [place for place in (text.find(s) for s in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of the text that a stop string may begin with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
