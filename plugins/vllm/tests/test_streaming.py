"""Eviction that depends on no data: as in the library, and blocks are given back while a request runs."""

from __future__ import annotations

import pytest
from replayed import assert_as_in_the_library

SETTINGS = {"method": "streaming", "budget": "64tok"}
NEW, BLOCK = 12, 32


@pytest.fixture(scope="module")
def found(serve, prompts):
    return serve([SETTINGS], prompts(16, 100), NEW)[0]


def test_sixteen_requests_at_once_are_each_as_in_the_library(found):
    assert_as_in_the_library(found)


def test_that_the_method_is_there_can_be_seen(found, own, prompts):
    assert found["tokens"][0] != own({"method": "full"}, prompts(1, 100), NEW)[0].argmax(-1).tolist()


def test_blocks_are_freed_while_requests_run(found):
    held = [step[0] for step in found["held"]]
    whole = sum(-(-n // BLOCK) for n in range(100, 100 + 5 * 16, 5))
    most = 16 * (64 // BLOCK + 2)  # sinks' block, the window, and where both ends cut a block
    assert held[0] == whole
    assert max(held[1 : NEW - 1]) <= most < whole
    assert found["left"] == 0


def test_all_layers_are_one_group(found):
    assert (found["groups"], found["layers"]) == (["FreeingManager"], [30])
