"""docs/frontier.md: pictures and table of a run over whole families, from its summary alone."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from saccade.report.run import Run
from tests.report import synthetic

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
    yield importlib.import_module("frontier_page")
    sys.path.pop(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run.read(synthetic.make(tmp_path_factory.mktemp("run")))
    return dataclasses.replace(run, run={**run.run, "timed_budget": "0.25"})


def words(text: str) -> set[str]:
    return {"".join(found.itertext()) for found in ElementTree.fromstring(text).iter(f"{SVG}text")}


def test_each_part_has_a_picture_of_its_methods_and_of_chance(page, run):
    assert page.parts(run) == ["cache", "decode", "prefill"]
    for part, mine, others in (
        ("cache", {"snapkv", "knorm", "kivi", "random:part=evict"}, {"minference", "double-sparsity"}),
        ("decode", {"double-sparsity", "random:part=decode"}, {"snapkv", "minference"}),
        ("prefill", {"minference", "hip", "random:part=prefill"}, {"snapkv", "double-sparsity"}),
    ):
        found = words(page.drawn(run, part))
        assert mine | {"streaming", "full"} <= found and not others & found
        assert {"passkey", "50 %", "10 %"} <= found
        stage = "prefill" if part == "prefill" else "decoding"
        assert f"{stage} at 8,192 tokens, as fast as full" in found


def test_the_table_holds_means_of_the_summary(page, run):
    heads, rows = page.table(run)
    assert [row[0] for row in rows] == run.labels and {len(row) for row in rows} == {len(heads)}
    by_label = {row[0]: dict(zip(heads, row)) for row in rows}
    hits = [r["mean"] for r in run.rows if (r["label"], r["budget"]) == ("snapkv", "0.25")]
    assert by_label["snapkv"]["hits, 0.25"] == f"{sum(hits) / len(hits):.2f}" and len(hits) == 2
    assert by_label["full"]["loss, 0.5"] == "+0.000" and by_label["full"]["below random"] == "–"
    worse = [x["standing"] in ("below", "lower") for x in run.summary["transfer"] if x["label"] == "hip"]
    assert by_label["hip"]["below random"] == f"{sum(worse)} of {len(worse)}"
    at = ("label", "tokens", "budget")
    speed = next(s for s in run.summary["speed"] if list(map(s.get, at)) == ["hip", 8192, "0.25"])
    assert by_label["hip"]["prefill, as fast as full"] == f"{speed['prefill_speedup']:.2f} ×"
