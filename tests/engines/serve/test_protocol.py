"""What a body may say: whatever comes is understood or refused in words, and nothing is ignored."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.engines.serve import protocol
from saccade.engines.serve.jobs import Job, Refused, Wish
from saccade.engines.serve.protocol import Answer, Asked

HELLO = [{"role": "user", "content": "hello"}]
NAMES = [*protocol.NEUTRAL, *protocol.LABELS, *protocol.SHARED, *protocol.OWN["chat"], *protocol.OWN["text"], "other"]
words = st.text(max_size=5) | st.sampled_from(["user", "text"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
KEYS = st.sampled_from(["role", "content", "type", "text", "include_usage", "x"])
anything = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=3), max_leaves=8)


@given(st.sampled_from(["chat", "text"]), st.dictionaries(st.sampled_from(NAMES), anything, max_size=6))
def test_any_object_is_understood_or_refused(kind, body):
    good = {"model": "m", "messages": HELLO} if kind == "chat" else {"model": "m", "prompt": "x"}
    for one in (body, good | body):
        try:
            assert isinstance(protocol.read(kind, one), Asked)
        except Refused as error:
            assert error.status == 400 and len(str(error)) < 500
            json.dumps(protocol.error(error)).encode()


@given(st.binary(max_size=30) | anything.map(lambda x: json.dumps(x).encode()))
def test_any_bytes_are_an_object_or_refused(raw):
    try:
        assert isinstance(protocol.read_json(raw), dict)
    except Refused as error:
        assert error.status == 400 and str(error).startswith("read the body: it is ")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "it is no JSON (Expecting property name"),
        (b'{"a": NaN}', "it is no JSON (NaN is no number)"),
        (b"\xff", "it is no JSON ('utf-8' codec can't decode"),
        (b'{"a": "\\ud800"}', "it is no JSON ('utf-8' codec can't encode"),
        (b"[" * 100_000, "it is no JSON (it is nested too deeply)"),
        (b'{"a": ' + b"1" * 5000 + b"}", "it is no JSON (Exceeds the limit"),
        (b"[]", "it is a list. Send one JSON object."),
    ],
    ids=range(7),
)
def test_what_is_no_object_is_said(raw, said):
    with pytest.raises(Refused) as caught:
        protocol.read_json(raw)
    assert said in str(caught.value)


def chat(**changes):
    return protocol.read("chat", {"model": "m", "messages": HELLO, **changes})


def text(**changes):
    return protocol.read("text", {"model": "m", "prompt": "x", **changes})


@pytest.mark.parametrize(
    ("made", "changes", "said", "param"),
    [
        (chat, {"model": 3}, "read the request: it names no model. See: GET /v1/models", "model"),
        (chat, {"messages": []}, "read the messages: there are none. Give [", "messages"),
        (chat, {"messages": [{"content": "x"}]}, "read messages[0]: it has no role. Give one of system", "messages[0]"),
        (chat, {"messages": [*HELLO, {"role": "user"}]}, "read messages[1]: its content is not text.", "messages[1]"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "its content is", "messages[0]"),
        (chat, {"messages": [{"role": "tool", "content": "", "tool_calls": [1]}]}, '"tool_calls" is', "messages[0]"),
        (chat, {"prompt": "x"}, 'read "prompt": it is no field of this request, or one that', "prompt"),
        (chat, {"n": 2}, "n=2: this server does not do that. Leave it away.", "n"),
        (chat, {"logprobs": True}, "logprobs=true: this server does not do that.", "logprobs"),
        (text, {"logprobs": 0}, "logprobs=0: this server does not do that.", "logprobs"),
        (chat, {"tools": [{}]}, "tools=[{}]: this server does not do that.", "tools"),
        (chat, {"max_tokens": 0}, "max_tokens=0: it is a whole number from 1. Give one.", "max_tokens"),
        (chat, {"max_tokens": True}, "max_tokens=true: it is a whole number from 1.", "max_tokens"),
        (chat, {"max_tokens": 1, "max_completion_tokens": 2}, "and max_completion_tokens differ", "max_tokens"),
        (chat, {"temperature": 3}, "temperature=3: it is a number from 0 to 2. Give one.", "temperature"),
        (chat, {"temperature": float("nan")}, "temperature=NaN: it is a number from 0 to 2.", "temperature"),
        (chat, {"top_p": "1"}, 'top_p="1": it is a number from 0 to 1. Give one.', "top_p"),
        (chat, {"seed": 1.5}, "seed=1.5: it is a whole number from", "seed"),
        (chat, {"stop": ["a"] * 5}, "it is a text or up to 4 of them. Give that.", "stop"),
        (chat, {"stop": ""}, 'stop="": it is a text or up to 4', "stop"),
        (chat, {"stream": 1}, "stream=1: it is true or false. Give one of these.", "stream"),
        (chat, {"stream_options": {"include_usage": True}}, "of a request that streams. Leave it", "stream_options"),
        (text, {"prompt": ["a", "b"]}, "it is not one text, nor the token ids of one. Send one request", "prompt"),
        (text, {"prompt": [-1]}, "prompt=[-1]: it is not one text", "prompt"),
    ],
)
def test_what_is_wrong_is_said(made, changes, said, param):
    with pytest.raises(Refused) as caught:
        made(**changes)
    assert said in str(caught.value) and caught.value.param == param


def test_what_is_right_is_understood():
    given = {"max_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": -1, "stop": "x"}
    asked = chat(**given, n=1, user="me", tools=None, stream=True, stream_options={"include_usage": True})
    assert asked == Asked("chat", "m", HELLO, Wish(7, 0.0, 0.5, -1, ("x",)), True, True)
    assert chat().wish == Wish() and text().wish == Wish(16)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "developer", "content": parts}]).prompt == [{"role": "system", "content": "ab"}]
    assert [text(prompt=p).prompt for p in ("x", ["x"], [1, 2], [[1, 2]])] == ["x", "x", [1, 2], [1, 2]]


def test_answers_have_openai_s_own_types():
    """Validated strictly by the models of its client."""
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    job = Job([1, 2], Wish(), print, tokens=[3], reused_tokens=1)
    for asked, whole, piece in ((chat(), ChatCompletion, ChatCompletionChunk), (text(), Completion, Completion)):
        answer = Answer(asked)
        made = whole.model_validate(answer.whole("hi", "stop", job))
        assert made.usage.total_tokens == 3 and made.usage.prompt_tokens_details.cached_tokens == 1
        for one in (answer.piece("", first=True), answer.piece("x"), answer.piece("", "length"), answer.end(job)):
            if asked.kind == "chat" or (one["choices"] and one["choices"][0]["finish_reason"]):
                piece.model_validate(one)
