"""A real vLLM, and the library's own run of the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import saccade
from saccade.attach import fingerprint
from saccade.models.known import folder
from saccade.tasks._text import passage


@pytest.fixture(scope="session")
def model():
    """SmolLM2 and its tokenizer, as the library loads them."""
    return saccade.load()


@pytest.fixture(scope="session")
def mark(model) -> str:
    """Which model it is."""
    return fingerprint(model[0])


@pytest.fixture(scope="session")
def prompts(model):
    """`prompts(count, tokens)`: passages of the shipped prose, the first of so many tokens, each 5 longer."""
    return lambda count, tokens: [passage(model[1], tokens + 5 * i, i, 0)[0] for i in range(count)]


@pytest.fixture(scope="session")
def own(model):
    """`own(settings, prompts, n)`: of each prompt the logits [n v] of what the library itself writes; -inf: the end."""

    def run(settings: dict[str, Any], prompts: Sequence[list[int]], new_tokens: int) -> list[torch.Tensor]:
        out = []
        for prompt in prompts:
            with saccade.attach(model[0], settings["method"], budget=settings.get("budget", "1")):
                found = model[0].generate(
                    torch.tensor([prompt]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                    pad_token_id=0, return_dict_in_generate=True, output_scores=True,
                )  # fmt: skip
            out.append(torch.cat(found.scores))
        return out

    return run


@pytest.fixture(scope="session")
def serve(model):
    """`serve(settings, prompts, n)`: what a vLLM with the plug-in does under each of these, and the library under
    the same, or, so that a difference is seen, `against` others (`served.py`).
    """

    def run(
        settings: Sequence[dict[str, Any]], prompts: Sequence[list[int]], new_tokens: int,
        against: Sequence[dict[str, Any]] = (), **options: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
        asked = {"settings": settings, "prompts": prompts, "new_tokens": new_tokens, "options": options}
        asked["against"] = against or settings
        asked["model"] = str(folder("smollm2"))  # `model` has seen to it that it is there
        program = [sys.executable, str(Path(__file__).parent / "served.py")]
        done = subprocess.run(program, input=json.dumps(asked), capture_output=True, text=True)
        answer = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        assert answer, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads(answer[0].removeprefix("ANSWER "))

    return run
