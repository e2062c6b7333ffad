"""The summary is a pure function of the run and its lines, and its numbers are those of the samples."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.measure.summary import summarise
from tests.measure.validate import problems, schema

TASKS = {
    "loss": {"title": "Loss", "metric": "nll", "query_aware": None, "one_pass": True},
    "passkey": {"title": "Passkey", "metric": "hit", "query_aware": True, "one_pass": False},
}


def line(label, task, scores, repeat=0, budget="0.25", error=None):
    head = {"schema": 1, "key": f"{label}{task}{repeat}{budget}", "kind": "quality", "model": "m", "label": label}
    head |= {
        "budget": "1" if label == "full" else budget,
        "task": task,
        "tokens": 64,
        "count": len(scores),
        "repeat": repeat,
    }
    head |= {"dtype": "float32", "seed": 0, "identity": "", "error": error, "started": "now", "seconds": 1.0}
    samples = [{"id": f"s{i}", "facts": {}, "score": s, "prefill_density": 0.5} for i, s in enumerate(scores)]
    for sample in samples:
        sample |= {"seconds_prefill": 0.1, "seconds_decode": 0.1, "asked": "a", "expected": "e", "said": "s"}
    names = ("kept_fraction", "prefill_density", "decode_density", "bytes_held", "bytes_full")
    method = {"method": label, "part": None, "baseline": label == "full", "seconds_warmup": 0.1, "back_ends": []}
    return head | method | {"samples": samples, "achieved": dict.fromkeys(names, 0.5), "kept": None}


def round_of(number, tokens, times, part="prefill"):
    entries = [
        {
            "method": name,
            "label": name,
            "part": None if name == "full" else part,
            "budget": "1" if name == "full" else "0.25",
            "error": None,
        }
        | {"bytes_held": 10, "warmup_seconds": 0.1, "prefill_seconds": t, "decode_seconds": t / 10}
        for name, t in times.items()
    ]
    return line("*", "speed", [], number) | {
        "kind": "speed",
        "key": f"{tokens}/{number}",
        "tokens": tokens,
        "measures": entries,
    }


def run_of(lines):
    return {
        "model": "m",
        "tasks": TASKS,
        "not_exercised": [],
        "left_out": [],
        "command": "c",
        "cells": [x["key"] for x in lines],
    }


def summary(*lines):
    found = summarise(run_of(lines), {x["key"]: x for x in lines})
    assert problems(found, schema("summary")) == []
    return found


def row(found, label, task="loss"):
    return next(r for r in found["rows"] if (r["label"], r["task"]) == (label, task))


scores = st.lists(st.floats(0.5, 9), min_size=2, max_size=12)


@given(scores, st.floats(-0.4, 2.0))
def test_a_constant_loss_is_found_exactly(full, worse):
    found = row(summary(line("full", "loss", full), line("x", "loss", [s + worse for s in full])), "x")
    assert found["diff"] == pytest.approx(worse, abs=1e-9)
    assert found["perplexity_ratio"] == pytest.approx(math.exp(worse))


@given(scores, st.randoms())
def test_the_order_of_lines_on_disk_does_not_matter(full, shuffle):
    lines = [line("full", "loss", full), line("full", "loss", full, 1), line("x", "loss", full[::-1])]
    lines += [round_of(i, n, {"full": 1.0, "x": 2.0}) for i in range(2) for n in (64, 128)]
    mixed = shuffle.sample(lines, len(lines))
    assert summarise(run_of(lines), {x["key"]: x for x in mixed}) == summary(*lines)


def test_lines_of_other_runs_are_ignored_and_missing_ones_counted():
    lines = [line("full", "loss", [1.0, 2.0]), line("x", "loss", [1.0, 2.0])]
    other = line("y", "loss", [5.0, 5.0])
    run = run_of(lines)
    assert summarise(run, {x["key"]: x for x in [*lines, other]}) == summary(*lines)
    assert summarise(run, {lines[0]["key"]: lines[0]})["missing"] == 1


def test_noise_of_full_hides_what_lies_within_it():
    full, draw = [2.0 + i / 10 for i in range(12)], random.Random(0)
    noisy = [s + draw.uniform(-0.05, 0.05) for s in full]
    lines = [
        line("full", "loss", full),
        line("x", "loss", [s + 0.01 for s in full]),
        line("y", "loss", [s + 1 for s in full]),
    ]
    quiet, loud = summary(*lines), summary(*lines, line("full", "loss", noisy, 1))
    assert row(quiet, "x")["seen"] and not row(loud, "x")["seen"]
    assert row(loud, "y")["seen"] and 0 < loud["noise"]["loss"] < 0.1 and quiet["noise"] == {}


def test_breaks_are_right_under_full_and_wrong_under_the_method():
    found = summary(
        line("full", "passkey", [1.0, 1.0, 0.0]),
        line("x", "passkey", [0.0, 1.0, 0.0], budget="0.1"),
        line("x", "passkey", [0.0, 1.0, 1.0], budget="0.5"),
        line("base", "passkey", [0.0, 0.0, 0.0]) | {"baseline": True},
    )
    assert [(b["id"], b["budget"], b["full"], b["score"]) for b in found["breaks"]] == [
        ("s0", "0.5", 1, 0),
        ("s0", "0.1", 1, 0),
    ]


def test_failures_are_told_and_make_no_row():
    failed = line("x", "loss", [], error={"type": "CannotRun", "text": "why"})
    found = summary(line("full", "loss", [1.0, 2.0]), failed)
    assert found["failed"] == [
        {"label": "x", "budget": "0.25", "task": "loss", "tokens": 64, "type": "CannotRun", "text": "why"}
    ]
    assert [r["label"] for r in found["rows"]] == ["full"]


def test_speed_is_the_median_of_rounds_side_by_side():
    slow_minute = [1.0, 5.0, 1.0]  # hits all of one round
    lines = [round_of(i, 512, {"full": 2.0 * s, "x": 1.0 * s}) for i, s in enumerate(slow_minute)]
    full, x = summary(*lines)["speed"]
    assert (full["prefill_seconds"], x["prefill_seconds"], x["prefill_spread"]) == (2.0, 1.0, 4.0)
    assert x["prefill_speedup"] == 2.0 and full["prefill_speedup"] == 1.0


def test_crossover_is_between_the_lengths_around_it():
    lines = [round_of(0, n, {"full": n / 100, "x": 5 + n / 1000}) for n in (128, 256, 512, 1024)]
    prefill = next(c for c in summary(*lines)["crossover"] if c["stage"] == "prefill")
    assert prefill["tokens"] == pytest.approx(5 / (1 / 100 - 1 / 1000), rel=0.05)


def test_a_method_crosses_over_only_where_it_has_a_part():
    times = {"full": 2.0, "x": 1.0}
    for part, stages in (("prefill", ["prefill"]), ("cache", ["decode"]), ("prefill+cache", ["prefill", "decode"])):
        found = summary(*[round_of(i, 512, times, part) for i in range(2)])["crossover"]
        assert [(c["stage"], c["tokens"]) for c in found] == [(stage, 512) for stage in stages]


def test_faster_in_one_round_of_two_is_noise():
    lines = [round_of(0, 512, {"full": 2.0, "x": 1.0}), round_of(1, 512, {"full": 2.0, "x": 2.1})]
    found = summary(*lines)
    assert (
        found["crossover"] == [{"method": "x", "label": "x", "budget": "0.25", "stage": "prefill", "tokens": None}]
        and found["speed"][1]["prefill_speedup"] > 1
    )


def test_a_timing_that_failed_is_told_once():
    lines = [round_of(i, 64, {"full": 1.0, "x": 1.0}) for i in range(2)]
    for x in lines:
        bad = {"type": "ValueError", "text": "no"}
        x["measures"][1] = {k: x["measures"][1][k] for k in ("method", "label", "part", "budget")} | {"error": bad}
    found = summary(*lines)
    assert [f["label"] for f in found["failed"]] == ["x"] and [r["label"] for r in found["speed"]] == ["full"]


def test_a_summary_can_be_written():
    json.dumps(summary(line("full", "loss", [1.0]), line("x", "loss", [2.0])), allow_nan=False)
