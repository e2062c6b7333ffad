"""The HTTP side in this process: who may ask, what is refused and how, answers whole and in pieces."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from saccade import models
from saccade.core.errors import BadOption, CannotRun
from saccade.engines.serve import address, app
from saccade.engines.serve.reader import PLAIN, Reader
from tests.engines.serve.helpers import TEXT, alone, ids, service, until
from tests.measure import small

CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
PROMPT = {"model": "tiny", "prompt": TEXT[:40], "max_tokens": 8, "temperature": 0}
HERE = "http://localhost"


@pytest.fixture(scope="module")
def client():
    made = service("snapkv", models.tiny("llama"))  # the shared one stays free for others
    with made as s, TestClient(app.make_app(s, "tiny"), HERE, raise_server_exceptions=False) as c:
        yield c


def written(method="snapkv", prompt=None, count=8) -> str:
    tokens = alone(method, [prompt or ids(40)], [count])[0]
    return small.tokenizer().decode([t for t in tokens if t != 2], skip_special_tokens=True)


@pytest.fixture(scope="module")
def wanted():
    """Before anything is attached."""
    chat = [ord(c) if c != "\n" else 10 for c in "User: hello\nAssistant:"]
    return {CHAT: written(prompt=chat), TEXTS: written()}


def said(reply) -> dict:
    """The error in OpenAI's form."""
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def events(reply) -> list:
    """What a stream sent."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (TEXTS, PROMPT)])
def test_whole_and_in_pieces_it_is_the_text_of_generate(wanted, client, path, body):
    whole = client.post(path, json=body).json()
    choice = whole["choices"][0]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert text == wanted[path] and choice["finish_reason"] in ("length", "stop")
    found = events(client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}))
    choices = [e["choices"][0] for e in found[:-1]]
    pieces = [c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices]
    assert "".join(pieces) == text and found[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert found[-1]["choices"] == [] and found[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert len({e["id"] for e in found}) == 1


def test_token_ids_are_a_prompt(wanted, client):
    assert client.post(TEXTS, json=PROMPT | {"prompt": ids(40)}).json()["choices"][0]["text"] == wanted[TEXTS]
    reply = client.post(TEXTS, json=PROMPT | {"prompt": [5, 128]})
    assert reply.status_code == 400 and "the model knows those below 128" in said(reply)["message"]


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"model": "gpt-9"}, 404, "ask 'gpt-9': this server has 'tiny'."),
        ({"max_tokens": 99_999}, 400, "read 22 tokens and write 99,999: this model has 4,096 positions."),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "read 5,017 tokens and write 8: this model"),
        ({"n": 3}, 400, "n=3: this server does not do that."),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_before_anything_is_sent(client, change, status, text, stream):
    reply = client.post(CHAT, json=HELLO | {"stream": stream} | change)
    assert reply.status_code == status and said(reply)["message"].startswith(text)
    assert said(reply)["type"] == "invalid_request_error"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("raw", "headers", "status", "text"),
    [
        (b"{", JSON, 400, "read the body: it is no JSON ("),
        (b"{}", {"content-type": "text/plain"}, 415, "read the body: it is not said to be JSON. Send the header"),
        (b" " * (app.BODY_BYTES + 1), JSON, 413, "read the body: it is longer than 8,388,608 bytes. Send a shorter"),
        (b"{}", JSON, 400, "read the request: it names no model."),
    ],
    ids=["half", "type", "long", "empty"],
)
def test_a_body_that_is_none_is_refused(client, raw, headers, status, text):
    reply = client.post(CHAT, content=raw, headers=headers)
    assert reply.status_code == status and said(reply)["message"].startswith(text)


def test_a_body_that_does_not_end_is_not_waited_for(client, monkeypatch):
    async def slow(request):
        await asyncio.sleep(5)

    monkeypatch.setattr(app, "_all_of", slow)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.01)
    reply = client.post(CHAT, json=HELLO)
    assert reply.status_code == 408 and said(reply)["message"].startswith("read the body: it did not come within 0 s.")


def test_other_places_and_ways_are_refused_in_the_same_form(client):
    for reply, status in ((client.get("/v2"), 404), (client.get(CHAT), 405), (client.post("/health"), 405)):
        assert reply.status_code == status and "See: /v1/chat/completions," in said(reply)["message"]


def test_models_and_health(client):
    listed = client.get("/v1/models").json()["data"]
    assert [m["id"] for m in listed] == ["tiny"] and client.get("/v1/models/tiny").json() == listed[0]
    assert client.get("/v1/models/a/b").status_code == 404
    found = client.get("/health").json()
    assert (found["status"], found["model"], found["method"], found["budget"]) == ("ok", "tiny", "snapkv", "0.5")
    assert found["chat"] == PLAIN


def test_only_who_has_the_key_is_answered():
    with service() as s, TestClient(app.make_app(s, "tiny", key="sesame"), "http://elsewhere") as c:
        for given in (None, "Bearer Sesame", "sesame", b"Bearer \xff"):
            reply = c.post(CHAT, json=HELLO, headers={"authorization": given} if given else {})
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert said(reply)["code"] == "invalid_api_key" and "sesame" not in reply.text
        assert c.get("/v1/models").status_code == 401 and c.get("/health").status_code == 200
        assert c.post(CHAT, json=HELLO, headers={"authorization": "Bearer sesame"}).status_code == 200


def test_without_a_key_only_this_machine_s_own_names_are_answered():
    with service() as s:
        with TestClient(app.make_app(s, "tiny"), "http://a.page.example") as c:
            reply = c.post(CHAT, json=HELLO)
            assert reply.status_code == 403
            assert "was asked as 'a.page.example'. Start it with a key." in said(reply)["message"]
        with TestClient(app.make_app(s, "tiny", any_host=True), "http://a.page.example") as c:
            assert c.post(CHAT, json=HELLO).status_code == 200
        for here in ("http://127.0.0.1:8000", "http://[::1]:8000", "http://[::1]", "http://LOCALHOST", "http://127.0.0.9"):
            with TestClient(app.make_app(s, "tiny"), here) as c:
                assert c.post(CHAT, json=HELLO).status_code == 200


def test_a_full_queue_is_told_when_to_come_again():
    with service(batch=1, queue=1) as s, TestClient(app.make_app(s, "tiny"), HERE) as c:
        go, step = threading.Event(), s._step
        s._step = lambda batch: (go.wait(60), step(batch))
        with ThreadPoolExecutor(8) as pool:
            replies = [pool.submit(c.post, CHAT, json=HELLO)]
            until(lambda: s.health()["running"] == 1)
            replies += [pool.submit(c.post, CHAT, json=HELLO) for _ in range(5)]
            until(lambda: sum(r.done() for r in replies) == 4)
            go.set()
            found = [r.result() for r in replies]
    refused = [r for r in found if r.status_code == 429]
    assert len(refused) == 4 and [r.status_code for r in found if r not in refused] == [200, 200]
    assert refused[0].headers["retry-after"] == "1" and said(refused[0])["type"] == "rate_limit_error"


def test_a_model_that_fails_is_said_whole_and_in_the_stream(monkeypatch):
    with service() as s, TestClient(app.make_app(s, "tiny"), HERE) as c:
        real, calls = s.model.forward, []

        def fails(*args, **kwargs):
            calls.append(1)
            if len(calls) in (1, 2, 5):
                raise ZeroDivisionError("secret")
            return real(*args, **kwargs)

        monkeypatch.setattr(s.model, "forward", fails)
        for stream in (False, True):  # nothing was sent yet: a plain error
            reply = c.post(CHAT, json=HELLO | {"stream": stream})
            assert reply.status_code == 500 and said(reply)["type"] == "server_error" and "secret" not in reply.text
        last = [x for x in c.post(CHAT, json=HELLO | {"stream": True}).text.split("\n\n") if x][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert c.post(CHAT, json=HELLO).status_code == 200


def test_a_bug_of_ours_is_said_in_the_same_form(client, monkeypatch):
    monkeypatch.setattr(app.protocol, "read", lambda *_: 1 / 0)
    reply = client.post(CHAT, json=HELLO)
    assert reply.status_code == 500 and "the server failed with a ZeroDivisionError" in said(reply)["message"]


# --- text to tokens ---------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


def test_messages_go_through_the_model_s_own_template(client, monkeypatch):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = TEMPLATE
    reader = Reader(tokenizer, 128)
    assert tokenizer.decode(reader.ids([{"role": "user", "content": "hi"}])) == "<user>hi<assistant>"
    with pytest.raises(app.Refused) as caught:
        reader.ids([{"role": "tool", "content": "x"}])
    assert "read the messages: the model's chat template says: no tools here. Change" in str(caught.value)


def test_without_a_template_messages_become_lines():
    chat = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]
    assert small.tokenizer().decode(Reader(small.tokenizer(), 128).ids(chat)) == "System: Be.\nUser: Hi\nAssistant:"


# --- where it listens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.5"])
def test_this_machine_alone_needs_no_key(host):
    address.check_key(host, None, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "8.8.8.8"])
def test_what_others_reach_needs_a_key_or_a_word(host):
    with pytest.raises(CannotRun, match=f"listen on {host}: others can reach that address, and no key is set"):
        address.check_key(host, None, False)
    address.check_key(host, "sesame", False)
    address.check_key(host, None, True)


@pytest.mark.parametrize("key", ["", " x", "ä", "a\nb"])
def test_a_key_that_no_header_carries_is_refused(key):
    with pytest.raises(BadOption, match=r"an API key: it is empty, or holds what a header cannot carry\. Give"):
        address.check_key("127.0.0.1", key, False)


def test_an_address_that_cannot_be_had_is_said():
    bound, url = address.listen("127.0.0.1", 0)
    with bound:
        port = bound.getsockname()[1]
        bound.listen()
        assert url == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(CannotRun, match=f"listen on 127.0.0.1:{port}: .*Give another --port; 0 takes a free one."):
            address.listen("127.0.0.1", port)
    with pytest.raises(BadOption, match=r"port 99999: ports are numbers below 65,536\. Give one; 0 takes a free one\."):
        address.listen("127.0.0.1", 99999)
    with pytest.raises(CannotRun, match=r"listen on 'no\.such\.host\.invalid': .* Give an address such as 127.0.0.1."):
        address.check_key("no.such.host.invalid", None, False)


def test_a_missing_extra_is_said(monkeypatch):
    address.check_extra()
    monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: None)
    said = "serve over HTTP: starlette and uvicorn are not installed. Install the extra: pip install 'saccade.serve.'."
    with pytest.raises(CannotRun, match=said):
        address.check_extra()
