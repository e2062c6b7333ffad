"""`show --picture`: a page with the numbers of `attended`, and errors for what is only asked of a picture."""

from __future__ import annotations

import base64
import json
import re

import plotly.graph_objects as go
import pytest
import torch

from saccade.cli import main
from saccade.measure.attended import attended
from saccade.report import figures
from saccade.report.words import say
from tests.measure import small
from tests.report.test_report import Page

PROMPT = "The whale swam past the ship, and nobody on the ship saw the whale."


def found(name, budget):
    ids = small.tokenizer()(PROMPT, return_tensors="pt").input_ids
    return attended(small.model(), ids, name, budget)


def test_the_page_holds_the_numbers_of_the_library(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "x.html"
    given = ["show", "snapkv:window_tokens=4", "--picture", str(out), "--prompt", PROMPT, "--model", tiny]
    assert main([*given, "--dtype", "float32", "--json", "--budget", "0.5"]) == 0
    said, ours = json.loads(capsys.readouterr().out), found("snapkv:window_tokens=4", 0.5)
    (shares,) = said["shares"]
    assert (said["method"], said["budget"], said["picture"]) == ("snapkv:window_tokens=4", "0.5", str(out))
    assert shares["queries"] == "decode" and shares["covered"] == pytest.approx(ours.stretches[0].covered)
    page = Page(out.read_text("utf-8"))
    words = page.text("attended")
    assert f"{say(shares['covered'], 'share')} of the exact mass" in words and "after the prompt" in words
    assert not {"src", "href", "srcset", "data"} & {name for _, attrs in page.tags for name in attrs}
    assert len(re.findall(r"\d\.\d", words)) > 2


@pytest.mark.parametrize("name", ["full", "streaming"])
def test_figures_unfold_to_the_maps(name):
    ours = found(name, 0.5)
    plots = figures.attended_maps(ours)
    chosen, mass = plots.figures
    for stretch in ours.stretches:
        for i, layer in enumerate(stretch.layers):
            for head in range(len(layer.covered)):
                one, other = (f.variants[f"{stretch.stage}|{i}|{head}"]["data"][0] for f in (chosen, mass))
                shares, there = codes(one), ~layer.chosen[head].isnan()
                assert torch.equal(shares != 255, there)
                assert torch.equal(shares[there], (100 * layer.chosen[head][there]).round().long())
                logs = (codes(other)[there] - 250) / 50
                assert float((logs - layer.mass[head][there].log10().clamp(min=-5)).abs().max()) <= 0.5 / 50 + 1e-6
    plain = json.loads(re.sub(r"\$\w+", "#123456", json.dumps(next(iter(mass.variants.values())))))
    go.Figure(plain["data"], plain["layout"])
    assert len(plots.tables[0].rows) == sum(len(layer.covered) for layer in ours.stretches[0].layers)


def codes(trace):
    rows, columns = map(int, trace["z"]["shape"].split(","))
    return torch.tensor(list(base64.b64decode(trace["z"]["bdata"]))).view(rows, columns)


def test_without_a_prompt_the_shipped_text_is_read(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("saccade.cli.show.PICTURE_TOKENS", 40)
    out = tmp_path / "x.html"
    assert main(["show", "full", "--picture", str(out), "--model", tiny]) == 0
    assert capsys.readouterr().out == f"{out}\n" and "Moby-Dick" in out.read_text("utf-8")


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["snapkv", "--budget", "0.5"], 2, "BadOption: show --budget 0.5: it is of a picture. Add --picture FILE.html"),
        (["snapkv", "--prompt-file", "x"], 2, "BadOption: show --prompt-file x: it is of a picture. Add --picture"),
        (["snapkv", "--device", "cuda"], 2, "BadOption: show --device cuda: it is of a picture. Add --picture FILE"),
        (["snapkv", "--picture", "x", "--prompt", " "], 2, "BadInput: a picture of a prompt: there is no text. Give"),
        (["snapkv", "--picture", "x", "--bibtex"], 2, "--bibtex: not allowed with argument --picture"),
        (["landmark", "--picture", "x"], 3, "CannotRun: use 'landmark' in a loaded model: it is a layer that is"),
    ],
)
def test_errors_say_what_to_do(given, code, said, capsys):
    assert main(["show", *given]) == code
    assert said in capsys.readouterr().err
