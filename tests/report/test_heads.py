"""The heads of an artefact: the page, its figure and its table hold the artefact's numbers and no others."""

from __future__ import annotations

import html
import itertools
import json
import re

import plotly.graph_objects as go
import pytest
import torch

import saccade
from saccade.core.artefact import Artefact
from saccade.core.errors import BadArtefact, BadInput
from saccade.report import figures
from saccade.report.heads import Heads
from tests.report.test_report import HOSTILE, Page

SHAPE = (5, 3)


def save(folder, model="tiny", **tensors):
    score = torch.arange(15.0).view(SHAPE) / 20
    held = {"active": 1 - score, "score": score, "biases": torch.zeros(3)} | tensors
    made = Artefact("retrieval-head", held, model, "abc", data="2 rows", figures={"right answers": "3 of 4"})
    return made.save(folder / "heads")


def test_the_figure_and_the_table_hold_what_the_artefact_holds(tmp_path):
    heads = Heads.read(save(tmp_path))
    plots = figures.heads_map(heads)
    assert heads.names == ("score", "active")
    assert [value for value, _ in plots.choosers[0].options] == ["score", "active"] == list(plots.figures[0].variants)
    for name, variant in plots.figures[0].variants.items():
        assert variant["data"][0]["z"] == heads.artefact.tensors[name].tolist()
        plain = json.loads(re.sub(r"\$\w+", "#123456", json.dumps(variant)))  # the theme's colours
        go.Figure(plain["data"], plain["layout"])
    (table,) = plots.tables
    assert [row[0].text for row in table.rows] == [f"{i}.{j}" for i in range(4, -1, -1) for j in (2, 1, 0)]
    for row, at in zip(table.rows, reversed(list(itertools.product(range(5), range(3))))):
        assert [c.value for c in row[1:]] == [heads.values(name)[at[0]][at[1]] for name in heads.names]


def test_a_page_that_loads_nothing(tmp_path):
    page = Page(saccade.report(save(tmp_path), out=tmp_path / "x.html").read_text("utf-8"))
    assert not {"src", "href", "srcset", "data"} & {name for _, attrs in page.tags for name in attrs}
    assert "by how much of a hidden answer it looks at" in page.text("heads")
    assert "3 of 4" in " ".join(page.words[""]) and "2 rows" in " ".join(page.words[""])
    assert sum("Plotly" in s and len(s) > 10**6 for s in page.scripts) == 1


def test_hostile_text_stays_text(tmp_path):
    text = saccade.report(save(tmp_path, model=HOSTILE), out=tmp_path / "x.html").read_text("utf-8")
    assert HOSTILE not in text and html.escape(HOSTILE, quote=False).split("|")[0] in text.replace("&#34;", '"')


@pytest.mark.parametrize("end", [".json", ".safetensors"])
def test_either_file_will_do_and_the_name_says_what_it_is(tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    made = saccade.report(save(tmp_path).with_suffix(end), format="markdown")
    assert str(made) == "retrieval-head-abc.md" and made.is_file()
    lines = made.read_text().splitlines()
    assert "| 4.2 | 0.700 | 0.300 |" in lines and "- Right answers: 3 of 4" in lines
    said = saccade.report(save(tmp_path).with_suffix(end), format="terminal")
    assert "retrieval-head of tiny" in said and "the first 15 of 15 heads" in said


def test_what_holds_nothing_per_head_is_refused(tmp_path):
    made = Artefact("double-sparsity", {"order": torch.zeros(2, 3, 4)}, "tiny", "abc").save(tmp_path / "other")
    said = r"a report on other\.safetensors: it holds order \[2, 3, 4\]\. Only \[layers, heads\] is shown"
    with pytest.raises(BadInput, match=said):
        saccade.report(made)
    with pytest.raises(BadArtefact, match=r"gone\.safetensors: it cannot be read"):
        saccade.report(tmp_path / "gone.json")
