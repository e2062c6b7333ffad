"""Methods whose heads differ: layers in which every head lets go are a group of their own, and its blocks are freed."""

from __future__ import annotations

import pytest
from replayed import assert_as_in_the_library

METHODS = [
    {"method": "duo-attention", "budget": "0.3"},
    {"method": "razor-attention:compensation=none,policy=roll", "budget": "0.3"},
    {"method": "moa", "budget": "0.2"},
]
PROMPT, NEW, BLOCK = 300, 12, 32


@pytest.fixture(scope="module", params=METHODS, ids=[one["method"] for one in METHODS])
def found(request, serve, prompts, mark):
    return serve([{**request.param, "fingerprint": mark}], prompts(1, PROMPT), NEW)[0]


def test_every_layer_and_token_is_as_in_the_library(found):
    assert_as_in_the_library(found)


def test_layers_that_stream_as_a_whole_give_blocks_back(found):
    whole = -(-PROMPT // BLOCK)
    assert set(found["groups"]) == {"FreeingManager", "FullAttentionManager"}
    during = found["held"][NEW // 2][1:]
    for kind, held in zip(found["groups"], during):
        assert held < whole if kind == "FreeingManager" else held >= whole
