"""Eviction that depends on no data: the same text, and blocks that are given back while a request runs."""

from __future__ import annotations

import pytest

SETTINGS = {"method": "streaming", "budget": "64tok"}
NEW, BLOCK = 12, 32


@pytest.fixture(scope="module")
def found(serve, prompts):
    return serve([SETTINGS], prompts(16, 100), NEW)[0]


def test_sixteen_requests_at_once_get_the_texts_that_the_library_gives_each(found, own, prompts):
    assert found["tokens"] == own(SETTINGS, prompts(16, 100), NEW)
    assert found["tokens"][:2] != own({"method": "full"}, prompts(2, 100), NEW)  # that the method is there can be seen


def test_blocks_are_freed_while_requests_run(found):
    held = [step[0] for step in found["held"]]
    whole = sum(-(-n // BLOCK) for n in range(100, 100 + 5 * 16, 5))
    most = 16 * (64 // BLOCK + 2)  # sinks' block, the window, and where both ends cut a block
    assert held[0] == whole
    assert max(held[1 : NEW - 1]) <= most < whole
    assert found["left"] == 0


def test_all_layers_are_one_group(found):
    assert (found["groups"], found["layers"]) == (["FreeingManager"], [30])
