"""Gates that learn a tiny model's maps; what they choose; going on where a calibration stopped; what is refused."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import pytest
import torch

import saccade
from saccade.attach import attach, explain
from saccade.attach.calibration import Subject
from saccade.attach.distil import distance
from saccade.core.artefact import Artefact
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.selection import Spans
from saccade.methods.sparse.seer_attention import SeerAttention, stored
from tests.methods.handmade import noise, site, tiny, tokens

SHORT = SeerAttention(block_tokens=8, train_steps=55, train_texts=2)


def rows():
    """Three texts of twelve blocks and one token."""
    return [tokens(97 + i)[:, i:] for i in range(3)]


def still(x, shifts):
    """Of layers without positions."""
    return x


@functools.cache
def model():
    """Its queries are large, so that its maps are no flat ones."""
    made = tiny()
    for layer in made.model.layers:
        layer.self_attn.q_proj.weight.data *= 20
    return made


@functools.cache
def learnt(parts=0):
    method = dataclasses.replace(SHORT, train_parts=parts)
    return dataclasses.replace(method, artefact=method.calibrate(Subject(model()), rows()))


def handmade(keys, **options):
    return SeerAttention(**options, artefact=Artefact("seer-attention", stored({"keys": keys}), "made up", "0"))


@pytest.mark.parametrize(("parts", "shapes"), [(0, {"keys": (2, 4, 48, 16)}),
                                               (2, {"keys": (2, 2, 48, 32), "queries": (2, 4, 16, 32)})])  # fmt: skip
def test_gates_come_closer_to_the_maps_than_means_are(parts, shapes):
    made = learnt(parts).artefact
    assert {name: tuple(x.shape) for name, x in learnt(parts).gates().items()} == shapes
    assert {x.dtype for name, x in made.tensors.items() if name in shapes} == {torch.int8}
    assert made.figures["distance"] < 0.8 * made.figures["distance_at_first"]


def test_the_distance_is_the_divergence_of_rows_from_a_quarter_on():
    logits, maps = noise(2, 3, 8, 8, name="logits").double(), noise(2, 3, 8, 8).double().exp().tril()
    total = []
    for b in range(2):
        for h in range(3):
            for i in range(2, 8):
                guess = logits[b, h, i, : i + 1].softmax(-1)
                wanted = maps[b, h, i, : i + 1] / maps[b, h, i, : i + 1].sum()
                total.append((wanted * (wanted / guess).log()).sum())
    torch.testing.assert_close(distance(logits, maps), torch.stack(total).mean())


@pytest.mark.parametrize(("share", "rows"), [(0.15, 0), (0.25, 0), (0.6, 1)])
def test_the_budget_is_spent_and_the_last_rows_are_whole_where_that_is_cheap(share, rows):
    method, n = handmade(noise(2, 4, 24, 8)), 2048
    q, k = noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k")
    chosen = method.select(q, k, site(share, queries=n, keys=n, turn=still))
    assert (chosen.q_block, chosen.k_block) == ((64, 64) if share > 0.2 else (32, 32))
    assert 0.93 * share < chosen.density().min() <= chosen.density().max() <= share
    assert sum(int(row[: i + 1].all()) for i, row in enumerate(chosen.table()[0, 0]) if i > 29) == rows
    assert isinstance(method.select(q, k, site(queries=n, keys=n, turn=still)), Spans)


def test_a_threshold_keeps_what_reaches_it():
    q, k, here = noise(1, 4, 512, 8, name="q"), noise(1, 2, 512, 8, name="k"), site(queries=512, keys=512, turn=still)
    densities = [
        float(handmade(3 * noise(2, 4, 24, 8), threshold=t).select(q, k, here).density().mean())
        for t in (0.0, 0.02, 0.2)
    ]
    assert densities[0] == 1.0 > densities[1] > densities[2] > 0
    first = site(0.5, queries=512, keys=512, turn=still)
    said = "threshold=0.02 keeps every block that reaches it, and would ignore the budget 0.5"
    assert said in handmade(noise(2, 4, 24, 8), threshold=0.02).check(first)


def test_stored_weights_are_within_half_a_step():
    weights = noise(2, 3, 6, 4) * torch.tensor([1.0, 0.0, 1e-3, 50.0])
    method = SeerAttention(artefact=Artefact("seer-attention", stored({"keys": weights}), "made up", "0"))
    step = weights.abs().amax(-2, keepdim=True) / 127
    assert ((method.gates()["keys"] - weights).abs() <= 0.6 * step + 1e-6).all()


# --- learning ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    fresh = learnt().artefact

    def stop(done, total, what):
        assert total == 58
        if done == stop.at:
            raise KeyboardInterrupt

    for stop.at in (2, 3 + 52):
        with pytest.raises(KeyboardInterrupt):
            saccade.calibrate(model(), SHORT, rows(), stop)
    with mock.patch.object(Subject, "capture_qkv", side_effect=AssertionError("a text was read again")):
        steps = []
        again = saccade.calibrate(model(), SHORT, rows(), lambda done, *_: steps.append(done))
    assert steps == [1, 2, 3, *range(3 + 51, 59)]  # saved after the 50th
    assert again.figures == fresh.figures and again.data == fresh.data
    assert torch.equal(again.tensors["keys"], fresh.tensors["keys"])
    assert not list(tmp_path.glob("drafts/seer-attention/*"))
    attach(model(), "seer-attention", budget=0.5).detach()


def test_a_draft_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "drafts").write_text("no folder")
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    said = r"keep the draft .*text-0\.safetensors: it cannot be written \(.+\)\. Make room, or move the cache"
    with pytest.raises(CannotRun, match=said):
        saccade.calibrate(model(), SHORT, rows())


def test_rows_that_cannot_be_learnt_from_are_refused():
    subject, end = Subject(model()), "blocks are of 8, and rows must be longer, and as long as each other. Cut them so."
    with pytest.raises(BadInput, match=rf"train gates on rows of \[9, 12\] tokens: {end}"):
        SHORT.calibrate(subject, [tokens(9), tokens(12)])
    with pytest.raises(BadInput, match=rf"train gates on rows of \[8\] tokens: {end}"):
        SHORT.calibrate(subject, [tokens(8)])
    spots = [dataclasses.replace(s, place=dataclasses.replace(s.place, turn=None)) for s in subject.found.sites]
    subject.found = dataclasses.replace(subject.found, sites=spots)
    with pytest.raises(CannotRun, match=r"train gates of .*: how layers \[0, 1\] mark positions is not known"):
        SHORT.calibrate(subject, rows())


def test_what_cannot_run_is_said():
    assert explain(model(), SHORT) == ["no gates were trained for this model: saccade calibrate seer-attention"]
    made = handmade(noise(2, 4, 24, 8))
    assert made.check(site(queries=4, keys=4)) == [
        "layer 0: how it marks positions is not known, and gates see queries without"
    ]
    assert made.check(site(queries=4, keys=4, heads=8, turn=still)) == [
        "its gates are for (layers, heads, head size) = (2, 4, 8), here: (2, 8, 8)"
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_tokens": 0}, r"seer-attention\.block_tokens=0: it takes at least 1\. Leave it away for our value\."),
        ({"train_steps": 0}, r"seer-attention\.train_steps=0: it takes at least 1"),
        ({"train_texts": 0}, r"seer-attention\.train_texts=0: it takes at least 1"),
        ({"threshold": 1.0}, r"seer-attention\.threshold=1\.0: it takes a share of a row's attention, from 0"),
        ({"learning_rate": 0.0}, r"seer-attention\.learning_rate=0\.0: it takes a number above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(BadOption, match=said):
        SeerAttention(**options)
