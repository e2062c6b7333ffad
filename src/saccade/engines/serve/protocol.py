"""OpenAI's words: what a request may say, and how answers and errors look."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saccade.engines.serve.jobs import Job, Refused, Wish

Kind = Literal["chat", "text"]

# what is not served, with the values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
}
LABELS = ("user", "metadata")  # say who asks; they change no answer
SHARED = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options")
OWN = {"chat": ("messages", "max_completion_tokens"), "text": ("prompt",)}
ROLES = ("system", "developer", "user", "assistant", "tool")
COMPLETION_TOKENS = 16  # OpenAI's default where a text is to be continued
MOST_STOPS = 4


@dataclass(frozen=True)
class Asked:
    """A request, read and checked. `prompt` is the messages of a chat, a text, or token ids."""

    kind: Kind
    model: str
    prompt: list[dict[str, str]] | str | list[int]
    wish: Wish
    stream: bool
    usage: bool  # say it at the end of a stream, too


def read_json(raw: bytes) -> dict[str, Any]:
    """The object in a body.

    Raises:
        Refused: it is no JSON, or no object.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_number)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        found = str(error).splitlines()[0] if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise Refused("read the body", f"it is no JSON ({found})", "Send one JSON object in UTF-8.") from error
    if not isinstance(body, dict):
        raise Refused("read the body", f"it is a {type(body).__name__}", "Send one JSON object.")
    return body


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def read(kind: Kind, body: Mapping[str, Any]) -> Asked:
    """A request for a chat or for a text to be continued.

    Raises:
        Refused: a field that is missing, wrong, unknown, or asks for what is not served.
    """
    body = {name: value for name, value in body.items() if value is not None}
    _only_known(kind, body)
    model = body.get("model")
    if not isinstance(model, str):
        raise Refused("read the request", "it names no model", "See: GET /v1/models", param="model")
    stream, options = _flag(body, "stream"), body.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage"} or (options and not stream):
        found = 'it is not {"include_usage": ...} of a request that streams'
        raise Refused(f"stream_options={_short(options)}", found, "Leave it away.", param="stream_options")
    prompt = _messages(body) if kind == "chat" else _prompt(body)
    return Asked(kind, model, prompt, _wish(kind, body), stream, _flag(options, "include_usage"))


def _only_known(kind: Kind, body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            if not any(value == ok and type(value) is type(ok) for ok in NEUTRAL[name]):
                do = "Leave it away."
                raise Refused(f"{name}={_short(value)}", "this server does not do that", do, param=name)
        elif name not in (*SHARED, *OWN[kind], *LABELS):
            found = "it is no field of this request, or one that this server does not know"
            raise Refused(f"read {_short(name)}", found, "Leave it away.", param=name[:64])


def _wish(kind: Kind, body: Mapping[str, Any]) -> Wish:
    most = {name: _whole(body, name, 1) for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(set(most.values())) > 1:
        found = "max_tokens and max_completion_tokens differ"
        raise Refused("limit the answer", found, "Give one.", param="max_tokens")
    usual = COMPLETION_TOKENS if kind == "text" else None
    return Wish(
        new_tokens=next(iter(most.values()), usual),
        temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
        seed=_whole(body, "seed", -(2**63)) if "seed" in body else None,
        stop=_stops(body.get("stop", [])),
    )


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Refused(f"{name}={_short(value)}", "it is true or false", "Give one of these.", param=name)
    return value


def _whole(body: Mapping[str, Any], name: str, least: int) -> int:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise Refused(f"{name}={_short(value)}", f"it is a whole number from {least}", "Give one.", param=name)
    return value


def _number(body: Mapping[str, Any], name: str, usual: float, least: float, most: float) -> float:
    value = body.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise Refused(f"{name}={_short(value)}", f"it is a number from {least:g} to {most:g}", "Give one.", param=name)
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        found = f"it is a text or up to {MOST_STOPS} of them"
        raise Refused(f"stop={_short(value)}", found, "Give that.", param="stop")
    return tuple(stops)


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        do = 'Give [{"role": "user", "content": "..."}].'
        raise Refused("read the messages", "there are none", do, param="messages")
    return [_message(i, message) for i, message in enumerate(given)]


def _message(index: int, message: Any) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Refused(f"read {where}", "it has no role", f"Give one of {', '.join(ROLES)}.", param=where)
    extra = {k for k, v in message.items() if v is not None} - {"role", "content", "name", "refusal"}
    if extra:
        raise Refused(f"read {where}", f"{_short(min(extra))} is not served", "Leave it away.", param=where)
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"] if parts else []
    if not isinstance(parts, list) or len(texts) != len(parts) or not all(isinstance(t, str) for t in texts):
        raise Refused(f"read {where}", "its content is not text", "Give a text, or parts of type text.", param=where)
    role = "system" if message["role"] == "developer" else message["role"]  # its older name, which templates know
    return {"role": role, "content": "".join(texts)}


def _prompt(body: Mapping[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    ids = isinstance(prompt, list) and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in prompt)
    if not (isinstance(prompt, str) or ids):
        found = "it is not one text, nor the token ids of one"
        raise Refused(f"prompt={_short(prompt)}", found, "Send one request for each prompt.", param="prompt")
    return prompt


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# --- answers ----------------------------------------------------------------------------------------------------------


class Answer:
    """The shapes of one answer, whole or in pieces."""

    def __init__(self, asked: Asked):
        self.chat, self.model, self.created = asked.kind == "chat", asked.model, int(time.time())
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, text: str, finish: str, job: Job) -> dict[str, Any]:
        """All at once."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._wrap(kind, [self._choice(said, finish)]) | {"usage": usage(job)}

    def piece(self, text: str, finish: str | None = None, first: bool = False) -> dict[str, Any]:
        """What a stream adds."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        said = {"delta": delta} if self.chat else {"text": text}
        return self._wrap(self._piece_kind(), [self._choice(said, finish)])

    def end(self, job: Job) -> dict[str, Any]:
        """The usage, after the last piece."""
        return self._wrap(self._piece_kind(), []) | {"usage": usage(job)}

    def _piece_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _choice(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _wrap(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}


def usage(job: Job) -> dict[str, Any]:
    """Tokens read and written; `cached_tokens` were read for an earlier request."""
    prompt, new = len(job.ids), len(job.tokens)
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts | {"prompt_tokens_details": {"cached_tokens": job.reused_tokens}}


def error(refused: Refused) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    said = {"message": str(refused), "type": refused.kind, "param": refused.param, "code": refused.code}
    return {"error": said}


def event(value: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
