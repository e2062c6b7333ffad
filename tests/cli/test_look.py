"""list, show, power and doctor: what they say is what the library knows."""

from __future__ import annotations

import dataclasses
import json

import pytest

from saccade import models, tasks
from saccade.claims import _found
from saccade.cli import main
from saccade.core import method as methods
from saccade.core import registry
from saccade.measure import stats
from saccade.tasks.training import list_training_tasks


def said(capsys, *given: str):
    assert main([*given, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_holds_all_methods_tasks_and_models(capsys):
    found = said(capsys, "list")
    assert [m["method"] for m in found["methods"]] == registry.list_methods()
    assert [t["task"] for t in found["tasks"]] == tasks.list_tasks()
    assert [t["to train on"] for t in found["training"]] == list_training_tasks()
    assert [m["model"] for m in found["models"]] == list(models.KNOWN)


def test_list_chooses_by_pattern_and_family(capsys):
    found = said(capsys, "list", "*kv*", "--family", "cache")
    assert [m["method"] for m in found.pop("methods")] == registry.list_methods("*kv*", "cache")
    assert not found


def test_nothing_listed_is_a_no(capsys):
    assert main(["list", "zzz"]) == 1
    assert capsys.readouterr() == ("", "nothing matches 'zzz'\n")


@pytest.mark.parametrize(("tier", "shown"), [("cpu", "in part"), ("smoke", "not attempted")])
def test_a_verdict_counts_from_the_tier_that_measures_the_paper(tier, shown, capsys, monkeypatch):
    line = {"method": "snapkv", "tier": tier, "verdict": "in part", "date": "2026-01-02T03:04:05"}
    line["reason"] = "Too short."
    monkeypatch.setattr("saccade.cli.list.latest", {"snapkv": line}.get)
    monkeypatch.setattr("saccade.cli.show.latest", {"snapkv": line}.get)
    (row,) = said(capsys, "list", "snapkv")["methods"]
    assert row["claim"] == shown
    assert main(["show", "snapkv"]) == 0
    assert f"Claim: in part (tier {tier}, 2026-01-02). Too short." in capsys.readouterr().out


@pytest.mark.parametrize("name", registry.list_methods())
def test_show_reads_from_the_source_what_the_class_has(name, capsys):
    found, made = said(capsys, "show", name), registry.get(name)
    card = json.loads(json.dumps(dataclasses.asdict(made.card)))
    assert {field: found[field] for field in card} == card
    assert found["claim"] == _found.latest(name)
    assert [o["option"] for o in found["options"]] == list(methods.options(made))
    assert [o["default"] for o in found["options"]] == [repr(v) for v in methods.options(made).values()]
    assert found["idea"].splitlines()[0] == made.__doc__.splitlines()[0]
    assert main(["show", name]) == 0
    out, texts = capsys.readouterr().out, (*made.card.departures, *made.card.lacks.values())
    assert all(text in out for text in (made.card.title, found["idea"], *texts))


def test_the_meaning_of_an_option_is_found_even_if_two_share_it(capsys):
    about = {o["option"]: o["about"] for o in said(capsys, "show", "hip")["options"]}
    assert about["query_block_tokens"] == about["key_block_tokens"] == "b_q, b_k"
    assert about["query_stride"] == "every such query of a block scores"


def test_bibtex(capsys):
    assert main(["show", "snapkv", "--bibtex"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("@misc{li2024,\n") and "eprint = {2404.14469}" in out and "Li and Huang and" in out


@pytest.mark.parametrize("effect", [0.02, 0.3])
def test_power_agrees_with_itself(effect, capsys):
    for row in said(capsys, "power", "--effect", str(effect)):
        (back,) = said(capsys, "power", "--count", str(row["samples"]), "--task", row["task"])
        assert back["effect"] <= effect + 5e-5  # of the rounding
        if row["samples"] > 2:
            sd = stats.difference_sd(row["spread"])
            assert stats.smallest_effect(row["samples"] - 1, sd) > effect


def test_power_as_a_table(capsys):
    assert main(["power", "--task", "loss", "--count", "9"]) == 0
    out, err = capsys.readouterr()
    assert "effect that 9 samples show" in out and "samples that show" not in out
    assert err.startswith("Paired, level 0.05, power 0.8")


def test_doctor_finds_what_is_here_and_names_nobody(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {row["what"]: row for row in said(capsys, "doctor")}
    assert found["torch"]["state"] == found["transformers"]["state"] == found["cache"]["state"] == "ok"
    assert found["model smollm2"]["state"] == "-"
    assert not any(str(tmp_path) in row["found"] for row in found.values())


def test_doctor_says_what_is_too_old(capsys, monkeypatch):
    monkeypatch.setattr("saccade.cli.doctor.requires", lambda _: ["torch>=99", "nobody-has-this>=1", "rich>=1"])
    assert main(["doctor", "--json"]) == 3
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["torch"]["state"] == found["nobody-has-this"]["state"] == "fail" and found["rich"]["state"] == "ok"
    assert found["nobody-has-this"]["found"] == "missing; needed: nobody-has-this>=1"
