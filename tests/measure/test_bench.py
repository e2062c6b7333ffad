"""Timing ops against dense attention: what a row says, on what it was measured, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, UnknownName
from saccade.measure import layers
from saccade.measure.bench import back_ends, bench, crossovers, difference, find, shapes
from saccade.measure.layers import Work, bench_layers, is_layer, slopes
from saccade.measure.stats import slope
from saccade.measure.workloads import BLOCK, PAGE, WORKLOADS, random_blocks

SMALL = {"device": "cpu", "dtype": "float32", "lengths": [256, 130], "heads": (4, 2, 16)}


def test_every_workload_is_an_op():
    assert {name.replace("-", "_") for name in WORKLOADS} <= set(ops.__all__)


def test_a_row_for_each_op_length_and_back_end_that_can_run():
    seen = []
    rows = bench(list(WORKLOADS), shapes(**SMALL), rounds=2, watch=lambda *said: seen.append(said))
    assert [(r["op"], r["tokens"]) for r in rows] == [(op, n) for op in WORKLOADS for n in (130, 256)]
    assert {r["impl"] for r in rows} == {"torch"}
    assert len(seen) == 2 * len(WORKLOADS) and seen[0][:2] == (0, len(seen))
    for row in rows:
        assert 0 < row["least"] <= row["seconds"] <= row["largest"] and row["first_seconds"] > 0 < row["speedup"]
        assert row["bytes"] > 0 and row["peak_bytes"] is None
    checked = {r["op"] for r in rows if r["difference"] is not None}
    assert checked == {"attend", "column-scores", "decode"} and all((r["difference"] or 0.0) < 1e-5 for r in rows)


@pytest.mark.parametrize("op", WORKLOADS)
def test_bytes_are_those_of_the_tensors_that_an_op_reads(op):
    (shape,) = shapes("cpu", "float32", [512], (4, 2, 16), density=0.25)
    q, k, _ = shape.draw()
    work, keys = find(op).work(shape), k.nbytes
    one = find(op).stage == "decode"
    assert work.dense_bytes == 2 * keys + 2 * (q[:, :, -1:] if one else q).nbytes
    if op in ("decode", "sparse-step"):  # a quarter of keys and values, and their lists or bounds
        assert keys // 2 <= work.bytes < work.dense_bytes


@settings(max_examples=20)
@given(st.integers(1, 900), st.floats(0.05, 1.0), st.integers(1, 2))
def test_random_blocks_have_the_density_that_was_asked(tokens, density, batch):
    (shape,) = shapes("cpu", "float32", [tokens], (4, 2, 16), density, batch)
    sizes = (shape.tokens, shape.density, BLOCK, shape.heads, shape.kv_heads)
    chosen, n = random_blocks(*sizes, rng.generator("test"), shape.batch), -(-tokens // BLOCK)
    assert (chosen.crow[..., -1] == max(n, round(density * (n * (n + 1) // 2)))).all()
    assert torch.equal(chosen.crow[:, 0], chosen.crow[:, 1])


def test_the_same_shape_draws_the_same_and_exact_ones_are_the_same_numbers():
    (shape,) = shapes("cpu", "bfloat16", [64], (4, 2, 16))
    assert all(torch.equal(a, b) for a, b in zip(shape.draw(), shape.draw()))
    load = find("attend")
    out = load.work(shape, exact=True).call(impl="reference")[0]
    assert out.dtype == torch.float64
    near = load.work(shape).call(impl="torch")[0]
    assert float((out - near.double()).abs().max()) == difference(load, shape, "torch") > 0
    assert difference(load, replace(shape, dtype=torch.float32), "torch") < difference(load, shape, "torch")


def test_back_ends_say_why_they_cannot():
    (shape,) = shapes("cpu", "float32", [10**9], (4, 2, 16))  # asking computes nothing of that size
    found = back_ends("attend", shape)
    assert found["torch"] == [] == found["reference"]
    assert len(found["triton"]) == 1 and "triton" in found["triton"][0].lower()


def test_explain_computes_nothing_and_ends_with_its_call():
    work = find("attend").work(shapes(**SMALL)[0])
    assert ops.explain(work.call)["torch"] == []
    assert ops.explain(lambda: None) == {}
    with pytest.raises(ZeroDivisionError):
        ops.explain(lambda: 1 / 0)
    assert isinstance(work.call()[0], torch.Tensor)


def test_the_crossover_is_that_of_the_best_back_end():
    def row(tokens, impl, seconds, speedup):
        return {"op": "x", "stage": "decode", "tokens": tokens, "impl": impl, "seconds": seconds, "speedup": speedup}

    slow, fast = row(64, "a", 4.0, 0.25), row(64, "b", 2.0, 0.5)
    later = [row(256, "a", 4.0, 0.5), row(256, "b", 1.0, 2.0)]
    (found,) = crossovers([slow, fast, *later])  # from twice as slow to half the time: at two thirds of the way
    assert found == {"op": "x", "stage": "decode", "tokens": pytest.approx(64 * 4 ** (2 / 3))}
    assert crossovers([slow, later[0]])[0]["tokens"] is None


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"lengths": [0]}, r"lengths \[0\]"),
        ({"heads": (4, 3, 16)}, "heads 4 3 16"),
        ({"batch": 0}, "batch 0"),
        ({"density": 0.0}, r"outside \(0, 1\]"),
        ({"density": 1.5}, r"density 1\.5"),
    ],
)
def test_shapes_that_cannot_be(asked, words):
    with pytest.raises(BadOption, match=words):
        shapes(**(SMALL | asked))


def test_an_op_that_is_not_there():
    with pytest.raises(UnknownName, match="Did you mean 'attend'"):
        find("atend")
    assert find("column_scores") is find("column-scores") and PAGE > 1


@given(st.floats(0.5, 3), st.floats(0.01, 10), st.sets(st.integers(0, 20), min_size=2))
def test_the_slope_of_a_power_law_is_its_power(power, factor, doublings):
    found = slope([(2**i, factor * 2 ** (i * power)) for i in doublings])
    assert found == pytest.approx(power)


def test_layers_are_timed_beside_full_attention_and_grow():
    specs = ["routing-transformer:clusters=sqrt", "scatterbrain"]
    work = Work("cpu", "float32", Budget.of("8tok"), [64, 36, 100], heads=2, head_size=8)
    rows, failed = bench_layers(specs, work, rounds=1)
    assert [(r["layer"], r["tokens"]) for r in rows] == [(s, n) for s in ["full", *specs] for n in (36, 64, 100)]
    assert failed == [] and all(r["speedup"] > 0 and 0 < r["density"] <= 1 for r in rows)
    assert [row["speedup"] for row in rows[:3]] == [1.0] * 3
    found = list(slopes(rows, ("layer",)))
    assert [(x["who"], x["points"]) for x in found] == [(s, 3) for s in ["full", *specs]]
    assert not list(slopes(rows[:2], ("layer",)))
    assert work.forward(specs[0], 100)[1].clusters == 10
    assert is_layer("landmark:read_blocks=2") and not is_layer("scatterbrain")


def test_what_runs_out_of_memory_is_said_and_the_rest_goes_on(monkeypatch):
    def full(spec, tokens, *_):
        if tokens == 64 and spec == "full":
            raise torch.OutOfMemoryError("too much\nof it")
        return {"layer": spec, "tokens": tokens, "seconds": 1.0}

    monkeypatch.setattr(layers, "_row", full)
    rows, failed = bench_layers(["landmark"], Work("cpu", "float32", Budget(1.0), [32, 64]), rounds=1)
    assert failed == [{"label": "full", "tokens": 64, "text": "too much"}]
    assert [(r["layer"], r["tokens"], r["speedup"]) for r in rows] == [
        ("full", 32, 1.0), ("landmark", 32, 1.0), ("landmark", 64, None)
    ]  # fmt: skip
