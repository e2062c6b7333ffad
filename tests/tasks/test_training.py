"""What every training task promises, and what each asks is right by a plain reading of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import BadOption, UnknownName
from saccade.tasks import training
from saccade.tasks._text import FILE
from saccade.tasks.training import mnist
from saccade.tasks.training._base import IGNORED
from saccade.tasks.training.listops import WORDS

HERE = [name for name in training.list_training_tasks() if training.get(name).missing() is None]
MADE = ["digits", "listops", "mobydick", "mqar", "needle"]
names = st.sampled_from(MADE)
FEW = settings(max_examples=12, deadline=None)


def test_the_tasks_of_the_library():
    assert set(training.list_training_tasks()) == {*MADE, "enwik8", "mnist"} and set(MADE) <= set(HERE)
    with pytest.raises(UnknownName, match=r"no training task 'digit'.*Did you mean 'digits'"):
        training.get("digit")


@pytest.mark.parametrize("name", training.list_training_tasks())
def test_what_is_said_of_a_task_is_what_it_is(name):
    made, said = training.get(name), training.describe(name)
    assert (made.name, said["name"]) == (name, name) and said["about"] and made.steps > 0
    assert made.kind in ("language", "vision") and made.metric in ("bits", "accuracy")


@given(name=names, step=st.integers(0, 999), rows=st.integers(1, 5), seed=st.integers(0, 99))
@FEW
def test_a_batch_depends_on_step_rows_and_seed_alone(name, step, rows, seed):
    one, two = (training.get(name).batch(step, rows, seed) for _ in range(2))
    assert torch.equal(one.inputs, two.inputs) and torch.equal(one.targets, two.targets)
    assert len(one.inputs) == len(one.targets) == rows
    others = [training.get(name).batch(step + 1, 8, seed), training.get(name).batch(step, 8, seed + 1)]
    assert not any(torch.equal(training.get(name).batch(step, 8, seed).inputs, other.inputs) for other in others)
    counted = one.targets[one.targets != IGNORED]
    assert len(counted) and int(counted.min()) >= 0 and int(counted.max()) < training.get(name).vocabulary


@pytest.mark.parametrize("name", MADE)
def test_what_is_held_out_is_the_same_for_all_and_in_whole_batches(name):
    task = training.get(name)
    batches, others = task.held_out(7), task.held_out(64)
    assert all(len(batch.inputs) == 7 for batch in batches[:-1])
    assert torch.equal(torch.cat([b.inputs for b in batches]), torch.cat([b.inputs for b in others]))


@given(tokens=st.integers(2, 300), step=st.integers(0, 99))
@FEW
def test_bytes_are_asked_of_the_text_and_the_end_is_held_out(tokens, step):
    task, text = training.get("mobydick", tokens), FILE.read_bytes()
    cut = len(text) - int(0.1 * len(text))
    for part, batches in ((text[:cut], [task.batch(step, 2, 0)]), (text[cut:], task.held_out(16)[:1])):
        for row, wanted in zip(batches[0].inputs.tolist(), batches[0].targets.tolist()):
            assert len(row) == tokens and row[1:] == wanted[:-1] and bytes([*row, wanted[-1]]) in part


@given(pairs=st.integers(1, 12), seed=st.integers(0, 99))
@FEW
def test_recall_is_solved_by_looking_up(pairs, seed):
    task = training.get("mqar", 16 * pairs)
    batch = task.batch(0, 3, seed)
    for row, wanted in zip(batch.inputs.tolist(), batch.targets.tolist()):
        known = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]))
        half = task.vocabulary // 2
        assert len(known) == pairs == len(set(known.values())) and max(known) < half <= min(known.values())
        answers = {place: known[key] for place, key in enumerate(row) if place >= 2 * pairs and key}
        assert {i: value for i, value in enumerate(wanted) if value != IGNORED} == answers and len(answers) == pairs


@given(seed=st.integers(0, 99), tokens=st.integers(16, 200))
@FEW
def test_a_needle_stands_once_in_prose_and_is_asked_for_at_the_end(seed, tokens):
    batch = training.get("needle", tokens).batch(0, 3, seed)
    for row, wanted in zip(batch.inputs.tolist(), batch.targets.tolist()):
        assert row[-4:] == [1] * 4 and wanted == [IGNORED] * (tokens - 4) + [wanted[-1]] * 4
        found = [place for place, token in enumerate(row) if token in (3, 4, 5, 6)]
        assert [row[place] for place in found] == wanted[-4:] and found == list(range(found[0], found[0] + 4))


@given(seed=st.integers(0, 99), tokens=st.integers(16, 200))
@FEW
def test_lists_come_to_what_python_says(seed, tokens):
    batch = training.get("listops", tokens).batch(0, 2, seed)
    means = {"[MIN": "min((", "[MAX": "max((", "[SM": "(lambda x: sum(x) % 10)((", "[MED": "int(np.median(("}
    ends = {"[MIN": "))", "[MAX": "))", "[SM": "))", "[MED": ")))"}
    for row, wanted in zip(batch.inputs.tolist(), batch.targets.tolist()):
        assert len(row) == tokens
        text, open_lists = "", []
        for token, value in zip(row, wanted):
            word = WORDS[token]
            if word in means:
                open_lists.append(word)
                text += means[word]
            elif word == "]":
                text += ends[open_lists.pop()] + ","
            elif word == "=":
                assert value == eval(text.rstrip(","), {"np": np}) and not open_lists
                text = ""
            else:
                text += f"{word},"
            assert (value != IGNORED) == (word == "=")


def test_digits_are_the_shipped_ones_and_none_is_in_both_parts():
    file = FILE.parent / "digits.csv.gz"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (FILE.parent / "README.md").read_text()
    task = training.get("digits")
    held = torch.cat([batch.inputs for batch in task.held_out(64)])
    seen = {tuple(x.flatten().tolist()) for step in range(20) for x in task.batch(step, 64, 0).inputs}
    assert len(held) == 359 and float(held.max()) == 1 and task.batch(0, 2, 0).inputs.shape[1:] == task.image
    assert not seen & {tuple(x.flatten().tolist()) for x in held}


def test_lists_of_brightness_become_pictures(tmp_path, monkeypatch):
    for digit in range(10):
        (tmp_path / f"{digit}.json").write_text('{"data": [%s]}' % ",".join([f"0.{digit}"] * 784 * 5))  # noqa: UP031
    (tmp_path / "0.json").rename(tmp_path / "model.json")
    ready = tmp_path / "ready.npz"
    mnist._unpack(tmp_path / "model.json", ready)
    monkeypatch.setattr(mnist, "place", lambda data: ready)
    pictures = mnist._all.__wrapped__()
    assert pictures.images.shape == (50, 1, 28, 28) and pictures.held == 10
    torch.testing.assert_close(pictures.images[:, 0, 0, 0], pictures.classes.float() / 10)


@pytest.mark.parametrize(
    ("name", "tokens", "words"),
    [
        ("digits", 16, "digits with 16 tokens: a picture has 64 patches. Leave it away."),
        ("mqar", 8, "mqar with 8 tokens: the shortest row has 16. Ask for more."),
        ("mqar", 33, "mqar with 33 tokens: their number must be even and below 512. Change it."),
    ],
)
def test_lengths_that_cannot_be_are_said(name, tokens, words):
    with pytest.raises(BadOption, match=words):
        training.get(name, tokens)


def test_a_text_too_short_is_said():
    with pytest.raises(BadOption, match=r"mobydick with 30000 tokens: a part of the text has 24777\. Ask for fewer"):
        training.get("mobydick", 30000).held_out(2)


def test_scores_are_sums_over_what_counts():
    targets = torch.tensor([1, IGNORED, 0, 1])
    logits = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert training.get("mqar").score(logits, targets) == (1.0, 3)
    bits, count = training.get("mobydick").score(torch.zeros(4, 2), targets)
    assert count == 3 and bits == pytest.approx(3.0)


def test_listing_and_describing_imports_no_torch():
    code = "import sys; from saccade.tasks import training as t; [t.describe(n) for n in t.list_training_tasks()]"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == "False", done.stderr
