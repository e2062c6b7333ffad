"""Maps of a finished run: what `attended` says of each contestant, at one head for all."""

from __future__ import annotations

import base64
import json

import pytest
import torch

from saccade import models
from saccade.cli import main
from saccade.core.errors import BadInput
from saccade.measure import pictures as maps
from saccade.measure.attended import attended
from saccade.measure.compare import compare
from saccade.measure.pictures import pictures
from tests.measure import small

METHODS = ("hip", "quest:dense_layers=0,page_tokens=4", "kivi", "hyperattention")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("somewhere") / "tiny")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run; budget 0.5 is not the one that is timed."""
    given = {"tasks": ["continuation-loss"], "tokens": 64, "count": 1, "lengths": (), "dtype": "float32"}
    return compare(tiny, METHODS, budgets=[0.5, 0.25], out=tmp_path_factory.mktemp("runs") / "a", **given)


@pytest.fixture(scope="module")
def found(run, tiny):
    return json.loads(pictures(run, tiny).read_text())


def test_every_contestant_is_drawn_or_said_why_not(run, found):
    there = {p["label"]: p["budget"] for p in found["pictures"]}
    there |= {w["label"]: w["budget"] for w in found["without"]}
    rows = json.loads((run / "summary.json").read_text())["rows"]
    assert set(there) == {row["label"] for row in rows}
    assert there["full"] == there["kivi"] == "1" and there["hip"] == "0.25"
    assert all(w["why"] for w in found["without"])
    assert len(json.dumps(found["pictures"])) < 10_000 * len(found["pictures"])


def test_it_is_what_attended_says(found, tiny):
    net, tokenizer = models.load(str(tiny), dtype="float32")
    ids = maps._text(tokenizer, 0)
    layer, head = found["layer"], found["head"]
    for picture in found["pictures"][:3]:
        ours = attended(net, ids, picture["label"], picture["budget"], later_tokens=maps.LATER_TOKENS)
        assert [s["stage"] for s in picture["stretches"]] == [s.stage for s in ours.stretches]
        for said, stretch in zip(picture["stretches"], ours.stretches):
            assert said["covered"] == round(stretch.covered, 4) and said["density"] == round(stretch.density, 4)
            share = stretch.layers[layer].chosen[head]
            codes = torch.tensor(list(base64.b64decode(said["chosen"]))).view(said["shape"])
            assert torch.equal(codes == 255, share.isnan())
            assert torch.equal(codes[codes < 255], (100 * share[codes < 255]).round().long())


def test_the_head_is_the_one_that_looks_afar():
    mass = torch.zeros(3, 8, 8)
    mass[0, :, 0] = 1  # the beginning
    mass[1].fill_diagonal_(1)
    mass[1, 7, 4] = 1  # near
    mass[2, 7, 3] = 0.1
    small, large = (maps.Maps(mass, x * mass, mass[:, 0, 0], mass[:, 0, 0]) for x in (1.0, 5.0))
    assert maps.furthest([large, large, small, small]) == (2, 2)
    assert maps.furthest([large, small, small, large]) == (3, 2)
    assert maps.furthest([small]) == (0, 2)


def test_of_another_model_or_of_no_run_there_are_none(run, tmp_path):
    with pytest.raises(BadInput, match=r"maps by smollm2: the run is of tiny\. Give the model of the run"):
        pictures(run, "smollm2")
    with pytest.raises(BadInput, match=r"its run\.json cannot be read .* Finish the run: saccade compare --out DIR"):
        pictures(tmp_path)


def test_the_report_makes_them_when_asked_and_shows_them_from_then_on(run, found, tmp_path, monkeypatch, capsys):
    out, asked = tmp_path / "x.html", []
    monkeypatch.setattr(maps, "pictures", lambda *given: asked.append(given[:3]))
    assert main(["report", str(run), "--pictures", "--model", "there", "--out", str(out)]) == 0
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert asked == [(run, "there", None)]
    assert out.read_text("utf-8").count("data:image/png;base64,") >= 2 * len(found["pictures"])
    assert main(["report", str(run), "--model", "there"]) == 2
    assert "they are of pictures. Add --pictures, or leave them away" in capsys.readouterr().err
