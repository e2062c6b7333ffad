"""What the claim of retrieval-attention reads off its curves."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from saccade.claims.retrieval_attention import Heads, curve, distances, means, share_at
from tests.methods.handmade import noise


def points(*pairs):
    return [{"layer": 3, "kind": "ivf", "effort": i, "recall": r, "visited": v} for i, (r, v) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("recall", "share"), [(0.2, 0.05), (0.4, 0.1), (0.6, 0.2), (0.8, 0.3), (0.9, 0.65), (1.0, 1.0)]
)
def test_between_two_efforts_lies_a_line_and_behind_the_last_all_keys(recall, share):
    other = [{"layer": 4, "kind": "ivf", "effort": 0, "recall": 1.0, "visited": 0.0}]
    assert share_at(other + points((0.4, 0.1), (0.8, 0.3)), 3, "ivf", recall) == pytest.approx(share)


def test_a_mean_is_over_layers():
    rows = [*points((0.4, 0.1)), {"layer": 4, "kind": "ivf", "effort": 0, "recall": 0.6, "visited": 0.3}]
    assert means(rows) == [{"who": "ivf", "effort": 0, "n": 2, "recall": 0.5, "visited": pytest.approx(0.2)}]


def test_queries_elsewhere_are_farther_from_the_keys():
    keys = noise(1, 4000, 8, name="keys") * torch.arange(1, 9)
    same, far = noise(1, 4000, 8, name="queries") * torch.arange(1, 9), keys + 5 * torch.arange(1, 9)
    (near,), (away,) = (distances(Heads(0, keys, x, x)) for x in (same, far))
    assert near == pytest.approx(1, abs=0.05) and away > 4


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
def test_a_curve_goes_up_to_all_keys():
    heads = Heads(5, *(noise(2, n, 8, name=str(n)) for n in (130, 40, 20)))
    rows = curve(heads, 10)
    assert {r["layer"] for r in rows} == {5}
    for kind, least in (("graph", 16), ("hnsw", 16), ("ivf", 1)):
        some = [r for r in rows if r["kind"] == kind]
        assert [r["effort"] for r in some] == sorted(r["effort"] for r in some) and some[0]["effort"] == least
        assert some[-1]["recall"] > 0.95 and some[0]["visited"] < some[-1]["visited"]
