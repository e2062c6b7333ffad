"""A real server in a process of its own, asked by OpenAI's own client: what `saccade serve` says, does and survives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from urllib.parse import urlsplit

import openai
import pytest

from tests.engines.serve.helpers import PATIENCE_SECONDS, alone, ids, until
from tests.measure import small

pytestmark = pytest.mark.slow  # a process that imports torch takes its time to start
KEY = "sesame"
METHODS = ("minference", "snapkv")


class Server:
    """`saccade serve` on a free port."""

    def __init__(self, folder, *more: str, key: str | None = KEY):
        model = ["--model", str(small.save(folder)), "--name", "tiny", "--dtype", "float32"]
        command = [sys.executable, "-m", "saccade", "serve", *model, "--port", "0", "--budget", "0.5", *more]
        env = {**os.environ, **({"SACCADE_API_KEY": key} if key else {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.said = self.process.stderr.readline().strip()
        assert "http://" in self.said, self.said + self.process.stderr.read()
        self.url = next(word for word in self.said.split() if word.startswith("http://"))
        until(self._up)

    def _up(self) -> bool:
        try:
            return self.health()["status"] == "ok"
        except OSError:
            return False

    def health(self) -> dict:
        with urllib.request.urlopen(self.url.removesuffix("v1") + "health", timeout=PATIENCE_SECONDS) as reply:
            return json.load(reply)

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=PATIENCE_SECONDS)

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=PATIENCE_SECONDS)[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    methods = [word for name in METHODS for word in ("--method", name)]
    made = Server(tmp_path_factory.mktemp("tiny"), *methods)
    yield made
    made.stop()


def written(prompts, count: int) -> list[str]:
    tokenizer, made = small.tokenizer(), alone("+".join(METHODS), prompts, [count] * len(prompts))
    return [tokenizer.decode([t for t in tokens if t != 2], skip_special_tokens=True) for tokens in made]


def test_it_says_where_it_listens_and_whether_a_key_is_needed(server):
    assert server.said.startswith("tiny with minference+snapkv at budget 0.5: http://127.0.0.1:")
    assert server.said.endswith("/v1 (clients need the API key)")


def test_openai_s_client_is_answered_whole_and_in_pieces(server):
    messages = [{"role": "user", "content": "Where is the whale?"}]
    prompt = [ord(c) for c in "User: Where is the whale?\nAssistant:"]
    [wanted], client = written([prompt], 12), server.client()
    given = {"model": "tiny", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**given)
    assert whole.choices[0].message.content == wanted and whole.usage.prompt_tokens == len(prompt)
    pieces = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == wanted
    assert pieces[-1].usage == whole.usage
    text = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
    assert text.choices[0].text == wanted
    assert [m.id for m in client.models.list()] == ["tiny"]


def test_sixty_four_at_once_get_what_each_would_get_alone(server):
    prompts = [ids(20 + n % 9, n) for n in range(64)]

    async def ask(client, prompt, stream):
        given = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        made = await client.completions.create(**given, stream=stream)
        return "".join([p.choices[0].text async for p in made]) if stream else made.choices[0].text

    async def ask_all():
        options = {"base_url": server.url, "api_key": KEY, "max_retries": 0, "timeout": PATIENCE_SECONDS}
        async with openai.AsyncOpenAI(**options) as client:
            return await asyncio.gather(*[ask(client, p, stream=bool(i % 2)) for i, p in enumerate(prompts)])

    assert asyncio.run(ask_all()) == written(prompts, 6)


def test_errors_are_those_that_the_client_knows(server):
    given = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        server.client("wrong").chat.completions.create(**given)
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        server.client().chat.completions.create(**{**given, "model": "other"})
    with pytest.raises(openai.BadRequestError, match="this model has 4,096 positions") as caught:
        server.client().chat.completions.create(**given, max_tokens=5000)
    assert caught.value.code == "context_length_exceeded" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="n=2: this server does not do that"):
        server.client().chat.completions.create(**given, n=2)


def send(server, path: str, body: bytes) -> socket.socket:
    """A request by hand, whose answer nobody waits for."""
    address = urlsplit(server.url)
    made = socket.create_connection((address.hostname, address.port), timeout=PATIENCE_SECONDS)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    made.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return made


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_stops_the_work(server, stream):
    body = {"model": "tiny", "prompt": ids(30, 5), "max_tokens": 4000, "temperature": 1, "stream": stream}
    before = server.health()["ended"]["cancelled"]
    hung = [send(server, "/v1/completions", json.dumps({**body, "seed": n}).encode()) for n in range(8)]
    until(lambda: server.health()["running"] > 0)
    for made in hung:
        made.close()
    until(lambda: server.health()["running"] == server.health()["waiting"] == 0)
    assert server.health()["ended"]["cancelled"] > before  # some may have ended by themselves
    assert server.health()["memory"]["bytes_reserved"] == 0


def test_broken_requests_leave_it_standing(server):
    for raw in (b"{", b"\xff\xfe", b"[]", b"null", b'{"model": "tiny", "messages": "x"}'):
        made = send(server, "/v1/chat/completions", raw)
        assert made.recv(64).startswith(b"HTTP/1.1 400 ")
        made.close()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as made:
        made.sendall(b"no HTTP at all\r\n\r\n")
    with socket.create_connection((address.hostname, address.port)) as made:  # half a body
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    assert server.health()["status"] == "ok"


def test_it_ends_when_it_is_told(tmp_path):
    made = Server(tmp_path, key=None)
    assert made.said.endswith("(no key is needed)")
    rest = made.stop()
    assert made.process.returncode in (0, 130) and "Traceback" not in rest
