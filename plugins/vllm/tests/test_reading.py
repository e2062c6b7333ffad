"""Methods that read or compute less and let nothing go: the same as in the library, layer by layer."""

from __future__ import annotations

import pytest
from replayed import TIES, assert_as_in_the_library

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
# what is served, and what the library does beside it, once of a prompt and once of what follows
OTHERWISE = {
    "prompt": ({"method": "random:part=prefill", "budget": "0.25"}, {"seed": 1}),
    "later": ({"method": "quest", "budget": "0.25"}, {"budget": "0.2"}),
}
READ = {1: (9, 48, 64), 3: (3, 63, 64)}  # lists, and keys in each: more than, and at most; quest reads whole pages
NEW = 16


@pytest.fixture(scope="module")
def served(serve, prompts, mark):
    served = [{**one, "fingerprint": mark} for one in (*METHODS, *(one for one, _ in OTHERWISE.values()))]
    against = served[: len(METHODS)] + [{**one, **other} for one, other in OTHERWISE.values()]
    return serve(served, prompts(2, 300), NEW, against)


@pytest.fixture(scope="module")
def found(served):
    return served[: len(METHODS)]


@pytest.mark.parametrize("number", range(len(METHODS)), ids=[one["method"] for one in METHODS])
def test_every_layer_and_token_is_as_in_the_library(found, number):
    assert_as_in_the_library(found[number])


@pytest.mark.parametrize("part", OTHERWISE)
def test_what_the_library_does_otherwise_is_seen(served, part):
    found = served[len(METHODS) + list(OTHERWISE).index(part)]
    for one in found["replayed"]:
        assert one[part] > TIES
        with pytest.raises(AssertionError):
            assert_as_in_the_library({"replayed": [one]})


@pytest.mark.parametrize("number", READ)
def test_each_query_reads_no_more_keys_than_the_budget_says(found, number):
    heads, over, most = READ[number]
    each = found[number]["read"] / (2 * (NEW - 1) * 30 * heads)
    assert over < each <= most < found[number]["there"] / (2 * (NEW - 1) * 30 * heads) / 4


def test_all_blocks_stay_until_the_request_ends(found):
    for one in found:
        held = [step[0] for step in one["held"]]
        assert held[: NEW - 1] == sorted(held[: NEW - 1]) and one["left"] == 0
