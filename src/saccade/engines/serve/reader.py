"""From messages and texts to token ids."""

from __future__ import annotations

import copy
from typing import Any

from saccade.engines.serve.jobs import Refused

PLAIN = "the model has no chat template: messages become lines of 'User: ...', and it goes on after 'Assistant:'"


def chat_note(tokenizer: Any) -> str:
    """What is to be said of how messages become a prompt; nothing where the model has a template for that."""
    return "" if tokenizer.chat_template else PLAIN


class Reader:
    """With a tokenizer of its own, so that another thread may decode meanwhile."""

    def __init__(self, tokenizer: Any, vocabulary: int):
        self.tokenizer, self.vocabulary = copy.deepcopy(tokenizer), vocabulary

    def ids(self, prompt: list[dict[str, str]] | str | list[int]) -> list[int]:
        """Token ids of messages, of a text, or those that were given.

        Raises:
            Refused: the chat template does not take these messages, or an id is none of the model's.
        """
        if isinstance(prompt, str):
            return self._text(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self._chat(prompt)
        if any(token >= self.vocabulary for token in prompt):
            raise Refused("read token ids", f"the model knows those below {self.vocabulary}", "", param="prompt")
        return [int(token) for token in prompt]

    def _text(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        if chat_note(self.tokenizer):
            lines = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
            return self._text("\n".join([*lines, "Assistant:"]))
        try:
            made = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates raise what they like: roles that do not alternate, no system message
            said = (str(error) or type(error).__name__).splitlines()[0]
            found = f"the model's chat template says: {said}"
            raise Refused("read the messages", found, "Change their roles or order.", param="messages") from error
        return list(made["input_ids"])
