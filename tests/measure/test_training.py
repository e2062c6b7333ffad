"""Training: what was broken off goes on to the same end, and shared work is the same work."""

from __future__ import annotations

import json
import math
import signal
import socket
import time

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import BadOption, CannotRun, CorruptResult, UnknownName
from saccade.measure.stats import mean_interval, paired
from saccade.measure.training import Plan, checkpoint, loop, train
from saccade.measure.training.orderings import orderings
from saccade.measure.training.plan import cell_folder, contestants, file_name
from saccade.measure.training.train import summarise
from saccade.measure.training.turns import Turns
from tests import processes
from tests.helpers import assert_within, rounding
from tests.mixers import Fading

# what is held out is judged in batches of so many rows: few rows would be many forwards
SMALL = {"tokens": 16, "rows": 32, "steps": 6, "channels": 8, "layers": 1, "heads": 2}
SHARED = {"seeds": 1, "dtype": "float64", "checkpoint_steps": 2}


def small(out, mixers=(), **changes):
    return train("mqar", mixers, out, **{**SMALL, **SHARED, "budget": "4tok", **changes})


def cell(out, mixer="full", seed=0):
    return json.loads((out / "cells" / file_name(mixer, seed) / loop.RESULT).read_text())


class Killed(BaseException):
    """Whatever ends a process."""


def test_what_was_broken_off_goes_on_to_the_same_end(tmp_path):
    told = []

    def kill(done, total, text):
        told.append((done, total))
        if len(told) == 5:
            raise Killed

    whole = small(tmp_path / "whole")
    with pytest.raises(Killed):
        small(tmp_path / "broken", progress=kill)
    folder = tmp_path / "broken" / "cells" / file_name("full", 0)
    assert [f.name for f in folder.iterdir()] == [checkpoint.NAME] and told[-1] == (5, 12)
    told = ["not again"] * 9
    small(tmp_path / "broken", progress=kill)
    assert len(told) == 9 + 2 + 6, "two steps behind the checkpoint of step 4, and random"
    assert cell(tmp_path / "broken")["losses"] == cell(tmp_path / "whole")["losses"]
    again = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert [line["scores"] for line in again["mixers"]] == [line["scores"] for line in whole["mixers"]]
    assert not list((tmp_path / "broken").rglob(f"{checkpoint.NAME}*"))


def command(out, *more: str) -> list[str]:
    """For `saccade` in a process of its own."""
    given = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    given += ["--seeds", "1", "--dtype", "float64", "--budget", "4tok", "--out", str(out), "--quiet", *more]
    return ["train", "--task", "mqar", *given]


def one_cell(out, steps):
    """`full` from seed 0 alone, where `small` would train it."""
    plan = Plan.of("mqar", "4tok", dtype="float64", learning_rate=None, **{**SMALL, "steps": steps})
    folder, told = out / "cells" / file_name("full", 0), []
    loop.run(loop.Work(plan, "full", "full", 0, folder, Accelerator(cpu=True), 1000, lambda *what: told.append(what)))
    return told


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(tmp_path):
    """SIGKILL, as no handler sees it."""
    steps = 120
    child = processes.start("saccade.cli:main", command(tmp_path, "--checkpoint", "1", "--steps", str(steps)))
    waiting = tmp_path / "cells" / file_name("full", 0) / checkpoint.NAME
    until = time.monotonic() + 200
    while not waiting.is_file() and child.process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    child.process.kill()
    code, said = child.wait()
    assert code == -signal.SIGKILL, f"it was over before it was killed: {said}"
    began = torch.load(waiting, weights_only=True)["step"]
    assert [step for step, _ in one_cell(tmp_path, steps)] == list(range(began + 1, steps + 1))
    one_cell(tmp_path / "whole", steps)
    assert cell(tmp_path)["losses"] == cell(tmp_path / "whole")["losses"]
    assert cell(tmp_path)["score"] == cell(tmp_path / "whole")["score"]


def test_two_processes_do_the_work_of_one(tmp_path):
    """As `accelerate launch` starts them, over gloo: the same losses and score, up to the order of sums."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ranks = [{**world, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    both = [processes.start("saccade.cli:main", command(tmp_path / "two"), **rank) for rank in ranks]
    (first, told), (second, nothing) = (child.wait(200) for child in both)
    assert (first, second) == (0, 0), told + nothing
    assert "mqar, 6 steps of 32 rows" in told and "mqar, 6 steps" not in nothing, "only the first speaks"
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    small(tmp_path / "one")
    for mixer in ("full", "random"):
        one, two = (cell(tmp_path / name, mixer) for name in ("one", "two"))
        losses, others = torch.tensor(one["losses"]).double(), torch.tensor(two["losses"]).double()
        assert_within(others, losses, rounding(losses, torch.float32))
        assert one["score"] == two["score"]


def test_layers_of_ones_own_take_part_beside_the_baselines(tmp_path):
    told = []
    mine = {"mine": Fading, "slow": lambda slot: Fading(slot, decay=0.9)}
    found = small(tmp_path, mine, seeds=2, progress=lambda *what: told.append(what))
    assert [line["mixer"] for line in found["mixers"]] == ["full", "mine", "slow", "random"]
    assert [line["density"] is None for line in found["mixers"]] == [False, True, True, False]
    assert [done for done, _, _ in told] == list(range(1, 2 * 4 * 6 + 1)) and {total for _, total, _ in told} == {48}
    assert all(0 <= score <= 1 for line in found["mixers"] for score in line["scores"])
    again = []
    assert small(tmp_path, mine, seeds=2, progress=again.append)["mixers"] == found["mixers"] and not again


@given(scores=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6))
@settings(max_examples=20)
def test_the_table_is_the_scores_over_seeds_and_their_differences_seed_by_seed(scores):
    plan = Plan.of("mqar", 0.25, None, "float32")
    rest = {"density": 0.5, "parameters": 7, "seconds": 1.0, "losses": [3.0] * 18 + [1.0, 2.0]}
    cells = [{"mixer": m, "score": s, **rest} for pair in scores for m, s in zip(("full", "m"), pair)]
    full, line = summarise(plan, cells)["mixers"]
    base, own = zip(*scores)
    assert full["minus_full"] is None and line["train_loss"] == 1.5 and line["scores"] == list(own)
    if len(scores) > 1:
        for said, meant in ((line["score"], mean_interval(own)), (line["minus_full"], paired(own, base, False))):
            assert said == {"mean": meant.mean, "low": meant.low, "high": meant.high}
    else:
        assert line["score"] == {"mean": own[0], "low": None, "high": None}


@given(scores=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6), higher=st.booleans())
@settings(max_examples=20)
def test_an_ordering_is_judged_by_the_whole_interval_and_turns_with_its_sides(scores, higher):
    lines = [{"mixer": who, "scores": list(own)} for who, own in zip("ab", zip(*scores))]
    one, two = (next(orderings(lines, [x], [y, x], higher)) for x, y in ("ab", "ba"))
    meant = paired(*(line["scores"] for line in (lines if higher else lines[::-1])), False)
    assert math.isclose(one["better_by"]["mean"], meant.mean, abs_tol=1e-12)
    if len(scores) == 1:
        assert one["verdict"] == two["verdict"] == "unclear" and one["better_by"]["low"] is None
    else:
        assert (one["verdict"] == "held") == (meant.low > 0) and (one["verdict"] == "not held") == (meant.high <= 0)
        assert one["verdict"] != "held" or two["verdict"] == "not held"


def test_mixers_are_judged_against_their_baselines_which_take_part(tmp_path):
    found = small(tmp_path, ["streaming"], against=["streaming:sink_tokens=0", "full"], seeds=2, steps=2)
    assert [line["mixer"] for line in found["mixers"]] == ["full", "streaming", "streaming:sink_tokens=0", "random"]
    pairs = [(line["mixer"], line["against"]) for line in found["orderings"]]
    assert pairs == [("streaming", "streaming:sink_tokens=0"), ("streaming", "full")]
    by_full = found["mixers"][1]["minus_full"]["mean"]
    assert found["orderings"][1]["better_by"]["mean"] == by_full, "of accuracies more is better"


def test_what_another_process_trains_is_left_to_it_and_waited_for(tmp_path, monkeypatch):
    """The child has its turn at `full`."""
    steps = 30
    child = processes.start("saccade.cli:main", command(tmp_path, "--steps", str(steps), "--checkpoint", "1"))
    theirs = cell_folder(tmp_path, "full", 0)
    until = time.monotonic() + 200
    while not (theirs / checkpoint.NAME).is_file() and time.monotonic() < until:
        time.sleep(0.01)
    ours = []
    found = small(tmp_path, steps=steps, progress=lambda done, total, text: ours.append(text.partition(",")[0]))
    code, said = child.wait(200)
    assert code == 0 and "full" not in ours, said
    assert [line["mixer"] for line in found["mixers"]] == ["full", "random"]


def test_a_cell_has_one_owner_until_that_one_ends(tmp_path):
    plan = Plan.of("mqar", "4tok", dtype="float64", learning_rate=None, **SMALL)
    here, one = cell_folder(tmp_path, "full", 0), Accelerator(cpu=True)
    mine = loop.Work(plan, "full", "full", 0, here, one, 9, lambda *_: None)
    with Turns() as turns:
        done = turns.take(mine)
    assert done == json.loads((mine.folder / loop.RESULT).read_text()) == Turns().take(mine)


def test_full_and_random_are_always_there():
    assert list(contestants([])) == ["full", "random"]
    assert list(contestants(["hip", "full"])) == ["full", "hip", "random"]
    assert list(contestants(["random:block_tokens=8"])) == ["full", "random:block_tokens=8"]
    assert contestants({"full": "full", "a_b": Fading}, ["a_b", "random"])["a_b"] is Fading
    assert list(contestants(["hip"], ["razor_x", "hip"])) == ["full", "hip", "razor-x", "random"]


def test_the_learning_rate_rises_and_falls():
    plan = Plan.of("mqar", 1.0, None, "float32", steps=100)
    rates = [loop.rate(plan, step) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert math.isclose(max(rates), plan.learning_rate) and top == 9 and rates[-1] > loop.LEAST * plan.learning_rate


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"task": "mqr"}, UnknownName, "no training task 'mqr'.*Did you mean 'mqar'"),
        ({"mixers": ["hop"]}, UnknownName, "no method 'hop'.*Did you mean 'hip'"),
        ({"mixers": ["knorm"]}, CannotRun, "train 'knorm' in a net: it selects nothing while a text is read"),
        ({"steps": 0}, BadOption, r"steps=0: it must be above zero\. Give such a number"),
        ({"seeds": 0}, BadOption, "seeds=0: it must be 1 or more"),
        ({"against": ["hop"], "mixers": ["hip"]}, UnknownName, "no method 'hop'"),
        ({"against": ["random"]}, BadOption, "judge nothing against random: there is no other mixer"),
        ({"checkpoint_steps": 0}, BadOption, "checkpoint_steps=0: it must be 1 or more"),
        ({"dtype": "float8"}, BadOption, "dtype='float8': it takes float32 or float64"),
        ({"channels": 9}, BadOption, "9 channels in 2 heads: the channels are not shared out evenly"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_said_before_anything_is(tmp_path, changes, error, words):
    given = {"task": "mqar", "mixers": [], **SMALL, **SHARED, **changes}
    with pytest.raises(error, match=words):
        train(given.pop("task"), given.pop("mixers"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_training_is_refused(tmp_path):
    small(tmp_path)
    with pytest.raises(CannotRun, match=r"use .*result\.json: it was made with other options\. Give the same, or"):
        small(tmp_path, rows=8)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_checkpoint_is_said(tmp_path, content):
    (tmp_path / checkpoint.NAME).write_bytes(content)
    said = r"read .*checkpoint\.pt: it is no whole checkpoint\. Delete it to begin anew"
    with pytest.raises(CorruptResult, match=said):
        checkpoint.load(tmp_path, "mark")


def test_a_checkpoint_of_another_training_is_refused_and_a_write_that_fails_leaves_the_last(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, "mark", step=1)
    assert checkpoint.load(tmp_path, "mark") == {"mark": "mark", "step": 1}
    with pytest.raises(CannotRun, match=r"go on from .*: it was made with other options"):
        checkpoint.load(tmp_path, "another")
    monkeypatch.setattr(torch, "save", lambda what, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path, "mark", step=2)
    assert checkpoint.load(tmp_path, "mark")["step"] == 1
    assert checkpoint.load(tmp_path / "nowhere", "mark") is None
