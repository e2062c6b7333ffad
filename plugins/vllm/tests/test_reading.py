"""Methods that read or compute less and let nothing go: the same text as the library's own run."""

from __future__ import annotations

import pytest

# every one of them in the same engine; the last are those whose state, artefact or lists are of another kind
METHODS = [
    {"method": "quest", "budget": "0.25"},
    {"method": "quest:group=per-head,dense_layers=0", "budget": "64tok"},
    {"method": "double-sparsity", "budget": "0.25"},
    {"method": "double-sparsity:group=max,dense_layers=0,label_bits=4", "budget": "64tok"},
    {"method": "recycled-attention:every_tokens=8", "budget": "0.25"},
    {"method": "tidaldecode", "budget": "0.25"},
    {"method": "minference", "budget": "0.25"},
    {"method": "hip", "budget": "0.25"},
    {"method": "flexprefill", "budget": "0.25"},
    {"method": "xattention", "budget": "0.25"},
    {"method": "moba", "budget": "0.25"},
    {"method": "hyperattention", "budget": "0.25"},
    {"method": "scatterbrain", "budget": "0.25"},
    {"method": "masformer", "budget": "0.25"},
    {"method": "oracle-topk", "budget": "0.25"},
    {"method": "random:part=prefill", "budget": "0.25"},
    {"method": "sea", "budget": "0.25"},
    {"method": "full", "budget": "1"},
]
READ = {1: (9, 48, 64), 3: (3, 63, 64)}  # lists, and keys in each: more than, and at most; quest reads whole pages
NEW = 16


@pytest.fixture(scope="module")
def found(serve, prompts, mark):
    return serve([{**one, "fingerprint": mark} for one in METHODS], prompts(2, 300), NEW)


@pytest.mark.parametrize("number", range(len(METHODS)), ids=[one["method"] for one in METHODS])
def test_the_text_is_that_of_the_library(found, own, prompts, number):
    assert found[number]["tokens"] == own(METHODS[number], prompts(2, 300), NEW)


@pytest.mark.parametrize("number", READ)
def test_each_query_reads_no_more_keys_than_the_budget_says(found, number):
    heads, over, most = READ[number]
    each = found[number]["read"] / (2 * (NEW - 1) * 30 * heads)
    assert over < each <= most < found[number]["there"] / (2 * (NEW - 1) * 30 * heads) / 4


def test_all_blocks_stay_until_the_request_ends(found):
    for one in found:
        held = [step[0] for step in one["held"]]
        assert held[: NEW - 1] == sorted(held[: NEW - 1]) and one["left"] == 0
