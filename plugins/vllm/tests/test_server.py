"""vLLM's OpenAI endpoint, started by the command that `saccade export` prints."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from replayed import ROUNDING, parting

SETTINGS = {"method": "streaming", "budget": "32tok"}
NEW = 8
START_SECONDS = 1800  # on two busy cores; half a minute on idle ones
SMALL = ["--dtype", "float32", "--max-model-len", "512", "--block-size", "32", "--max-num-seqs", "16"]


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    bin_ = Path(sys.executable).parent
    told = subprocess.run(
        [bin_ / "saccade", "export", SETTINGS["method"], "--to", "vllm", "--budget", SETTINGS["budget"], "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    _, *words = shlex.split(json.loads(told.stdout)["command"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "smollm2"]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    with open(log, "w") as out:
        command = [sys.executable, *words, *where, *SMALL, "--enforce-eager"]
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        _wait(server, port, log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
    finally:
        server.terminate()
        server.wait(60)


def _wait(server, port, log):
    for _ in range(START_SECONDS):
        assert server.poll() is None, log.read_text()[-6000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-6000:])


def test_sixteen_clients_at_once_get_the_texts_of_the_library_but_for_ties(client, model, prompts, own):
    asked = prompts(16, 60)

    def complete(prompt):
        given = {"min_tokens": NEW, "return_token_ids": True}
        got = client.completions.create(model="smollm2", prompt=prompt, max_tokens=NEW, temperature=0, extra_body=given)
        return got.choices[0].token_ids

    with ThreadPoolExecutor(16) as clients:
        texts = list(clients.map(complete, asked))
    for logits, tokens in zip(own(SETTINGS, asked, NEW), texts, strict=True):
        assert len(tokens) == NEW and parting(logits, tokens) <= ROUNDING


def test_a_chat_is_answered(client):
    said = [{"role": "user", "content": "Name a colour."}]
    got = client.chat.completions.create(model="smollm2", messages=said, max_tokens=8, temperature=0)
    assert got.choices[0].message.content.strip()
