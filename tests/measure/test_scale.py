"""The model of cost: it grows with the work, moves nothing where there is one GPU, and agrees with measurements."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.measure import scale
from saccade.measure.scale import BY_NAME, PHASES, WAYS, Cluster, Split
from saccade.models.shapes import SHAPES

ROOT = Path(__file__).parent.parent.parent
LLAMA, FULL = SHAPES["llama-3-8b"], BY_NAME["full"]
WITHIN = 1.35  # times, of a whole prefill or step that the model was not made of
FAST = Cluster(1, link=1e30, network=1e30, wait_seconds=0.0)

shapes, ways, phases = (st.sampled_from(list(x)) for x in (SHAPES.values(), WAYS, PHASES))
lengths = st.integers(13, 26).map(lambda i: 2**i)
gpus = st.integers(0, 10).map(lambda i: 2**i)


def seconds(shape, way, phase, tokens, split, cluster) -> float:
    return sum(PHASES[phase](shape, way, tokens, split, cluster).values())


def test_the_data_are_those_of_the_stored_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = importlib.import_module("scale")
    assert made.made() == made.DATA.read_text("utf-8"), "run: python benchmarks/scale.py"
    days = [name[-15:-5] for name, _ in made.read(made.MODELS)]
    assert days == sorted(days) and len(set(days)) > 1, "of a case that was measured again the later stands"


@settings(max_examples=60)
@given(shapes, ways, phases, lengths, gpus)
def test_more_tokens_never_cost_less(shape, way, phase, tokens, count):
    for split in Cluster(count).splits(shape):
        one, two = (seconds(shape, way, phase, n, split, Cluster(count)) for n in (tokens, 2 * tokens))
        assert 0 < one <= two
        held = [scale.held_bytes(shape, way, n, split) for n in (tokens, 2 * tokens)]
        assert 0 < held[0] <= held[1]


@settings(max_examples=60)
@given(shapes, ways, phases, lengths, gpus)
def test_on_links_without_limit_more_gpus_never_cost_more(shape, way, phase, tokens, count):
    one, two = (min(seconds(shape, way, phase, tokens, s, FAST) for s in Cluster(n).splits(shape))
                for n in (count, 2 * count))  # fmt: skip
    assert two <= one * (1 + 1e-9)


@settings(max_examples=60)
@given(shapes, ways, phases, lengths, gpus)
def test_faster_links_never_cost_more_and_one_gpu_needs_none(shape, way, phase, tokens, count):
    slow, fast = Cluster(count), Cluster(count, link=1e12, network=1e12)
    for split in slow.splits(shape):
        assert seconds(shape, way, phase, tokens, split, fast) <= seconds(shape, way, phase, tokens, split, slow)
    alone = PHASES[phase](shape, way, tokens, Split(1, 1), slow)
    assert alone["reduce"] == 0 and alone.get("keys", 0) == 0


@given(shapes, lengths)
def test_work_and_bytes_are_those_of_the_equations(shape, tokens):
    whole = dataclasses.replace(shape, windowed=0, window_tokens=0)
    assert scale.cache_bytes(whole, FULL, tokens) == 4 * whole.layers * tokens * whole.kv_heads * whole.head_size
    work = scale.dense_work(whole, tokens)
    pairs = tokens * tokens / 2
    assert work["prefill_flops"] == pytest.approx(
        whole.layers * (2 * tokens * whole.layer_parameters + 4 * pairs * whole.heads * whole.head_size)
    )
    assert scale.dense_work(shape, tokens)["prefill_flops"] <= work["prefill_flops"]
    assert work["step_bytes"] == scale.read_bytes(whole) + work["cache_bytes"]


def test_what_is_sent_is_that_of_the_rings():
    split = Split(4, 8)
    each = LLAMA.kv_bytes / 4
    assert scale.ring_bytes(LLAMA, FULL, 8000, split) == 7000 * each
    assert scale.ring_bytes(LLAMA, BY_NAME["window@4100tok"], 8000, split) == 4100 * each
    linear = [scale.ring_bytes(LLAMA, BY_NAME["linear"], tokens, split) for tokens in (8, 8000)]
    assert linear[0] == linear[1] > 0
    assert scale.reduce_bytes(LLAMA, 1000, split) == 2 * 2 * 3 / 4 * 1000 * LLAMA.hidden * 2
    assert scale.reduce_bytes(LLAMA, 1000, Split(1, 8)) == scale.ring_bytes(LLAMA, FULL, 8000, Split(4, 1)) == 0


def test_heads_are_split_within_a_node_and_never_one_between_two():
    assert [s.heads for s in Cluster(64).splits(LLAMA)] == [1, 2, 4, 8]
    assert [s.heads for s in Cluster(6).splits(LLAMA)] == [1, 2]
    assert [s.heads for s in Cluster(64).splits(SHAPES["gemma3-270m"])] == [1]
    assert all(s.gpus == 64 for s in Cluster(64).splits(LLAMA))


@pytest.mark.parametrize("row", scale.measured()["whole"], ids=lambda r: f"{r['method']}-{r['tokens']}-{r['layers']}")
def test_a_whole_prefill_is_what_was_measured(row):
    """Of parts: products and the rest by one length, attention by its own kernel alone."""
    if row["method"] == "full:attached":
        pytest.skip("dense is reckoned with the fastest kernel")
    if row["tokens"] < 32768 and row["method"] != "full":
        pytest.skip("the host's time, which is not that of a layer, weighs too much")
    shape = dataclasses.replace(LLAMA, layers=row["layers"])
    found = seconds(shape, BY_NAME[row["method"]], "prefill", row["tokens"], Split(1, 1), Cluster(1))
    assert 1 / WITHIN < found / row["seconds"] < WITHIN


def steps():
    """Of contexts that no line goes through; dense as the faster of its two."""
    known = scale.measured()["decode"]
    for method, points in known.items():
        for point in points:
            if method not in ("full", "full:attached", "double-sparsity") and point["tokens"] < 131072:
                yield method, point
    for a, b in zip(known["full"], known["full:attached"]):
        if a["tokens"] < 131072:
            yield "", min(a, b, key=lambda p: p["seconds"])


@pytest.mark.parametrize("method, point", list(steps()))
def test_a_step_is_what_was_measured_at_shorter_contexts(method, point):
    base, each = scale.step_line(method)
    found = base + each * point["batch"] * point["tokens"]
    assert 1 / WITHIN < found / point["seconds"] < WITHIN


@given(st.sampled_from(sorted(scale.measured()["prefill"])), st.floats(2e4, 4e5))
def test_a_curve_goes_through_its_points_and_never_turns_back(method, tokens):
    points = scale.measured()["prefill"][method]
    for point in points:
        assert scale.curve(points, point["tokens"]) == pytest.approx(point["seconds"])
    later = [p for p in points if p["tokens"] >= 32768]
    assert scale.curve(later, tokens) <= scale.curve(later, 1.1 * tokens)


def test_where_a_way_pays_it_is_faster_and_beyond_it_is_not():
    for way in WAYS[1:]:
        for phase in scale.phases(way):
            most = scale.pays_to(LLAMA, way, phase, 2**23, Cluster(1))
            if most is None or most == scale.MOST_GPUS:
                continue
            inside, outside = (scale.gain(LLAMA, way, phase, 2**23, Cluster(n)) for n in (most, 2 * most))
            assert inside >= scale.PAYS and outside < scale.PAYS


def test_what_does_not_fit_is_said_to_and_what_alone_fits_pays():
    assert not scale.cost(LLAMA, FULL, "decode", 2**20, Cluster(1)).fits
    assert scale.gain(LLAMA, FULL, "decode", 2**20, Cluster(1)) is None
    assert scale.gain(LLAMA, BY_NAME["snapkv"], "decode", 2**20, Cluster(1)) == math.inf
    assert scale.least_gpus(LLAMA, FULL, 2**20, Cluster(1)) == 2
    assert scale.least_gpus(SHAPES["llama-3-70b"], FULL, 2**27, Cluster(1, memory_bytes=1e9)) is None


def test_every_row_is_plain_and_whole():
    rows = list(scale.plan(LLAMA, 2**20, Cluster(8)))
    assert {row["way"].partition("@")[0] for row in rows} == {way.name.partition("@")[0] for way in WAYS}
    for row in rows:
        assert row["seconds"] == pytest.approx(sum(row["parts"].values()))
        assert row["over_heads"] * row["over_tokens"] == 8
