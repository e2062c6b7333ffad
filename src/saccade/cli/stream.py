"""A streamer for `generate`: text as it comes, and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Stream:
    """Writes what new tokens add to the text. `generate` hands over the prompt first, then token by token."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self.tokenizer, self.write, self.text = tokenizer, write, ""
        self.prompt_tokens, self.tokens, self.times = 0, [], []

    def start(self) -> None:
        """Now."""
        self.begun = time.perf_counter()

    def put(self, ids: Any) -> None:
        """The prompt, or a new token."""
        if not self.prompt_tokens:
            self.prompt_tokens = ids.numel()
            return
        self.times.append(time.perf_counter())
        self.tokens += ids.flatten().tolist()
        text = self._decoded()
        if not text.endswith("\ufffd"):  # half a letter: wait for the rest of its bytes
            self._add(text)

    def end(self) -> None:
        """What is left, whole or not."""
        self._add(self._decoded())

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _add(self, text: str) -> None:
        self.write(text[len(self.text) :])
        self.text = text

    @property
    def new_tokens(self) -> int:
        """How many were written."""
        return len(self.tokens)

    def figures(self) -> dict[str, Any]:
        """Tokens, and seconds until the first new token and from it to the last."""
        first, last = self.times[0], self.times[-1]
        seconds = {"seconds_prefill": first - self.begun, "seconds_decode": last - first}
        return {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens} | seconds
