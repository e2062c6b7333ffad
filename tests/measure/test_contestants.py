"""Names, options and compositions are read; what cannot be is said."""

from __future__ import annotations

import pytest

from saccade.core.budget import Budget
from saccade.core.errors import BadOption, DoesNotCompose, UnknownName
from saccade.core.method import options
from saccade.core.registry import card, get, list_methods
from saccade.measure.contestants import ATTACHED, Contestant, of_families, parse, usual, with_baselines
from tests.measure.small import model


@pytest.mark.parametrize("name", [n for n in list_methods() if card(n).family in ATTACHED and n != "full"])
def test_a_label_is_read_back(name):
    who = parse(name)
    assert who.label == name == who.names and parse(who.label) == who
    assert bool(who.parts) and who.part


def test_options_are_read_and_only_changed_ones_are_written():
    usual_window = options(get("snapkv"))["window_tokens"]
    who = parse(f"snapkv:pooling=avg,window_tokens={usual_window}")
    assert who.methods[0] == get("snapkv")(pooling="avg") and who.label == "snapkv:pooling=avg"


def test_methods_compose_by_plus_as_objects_and_as_lists():
    both = parse("minference+snapkv:window_tokens=8")
    assert both.names == "minference+snapkv" and both.part == "prefill+cache"
    assert both == parse([get("minference")(), get("snapkv")(window_tokens=8)])
    assert parse(both.label) == both
    assert parse(get("snapkv")()) == parse("snapkv")


def test_full_is_the_model_with_nothing_attached():
    full, net = parse("full"), model()
    assert (full.names, full.label, full.parts, full.part, full.baseline) == ("full", "full", (), None, True)
    with full.working(net, Budget.of(0.1), 0) as run:
        assert run is None and not hasattr(net, "_saccade_run")


@pytest.mark.parametrize(
    "spec, error, words",
    [
        ("snapvk", UnknownName, "no method 'snapvk': .* Did you mean 'snapkv'"),
        ("snapkv:window=8", BadOption, "option 'window' of snapkv: .*Did you mean 'window_tokens'"),
        ("snapkv:window_tokens", BadOption, r"'window_tokens' is no option=value\. Write NAME:OPTION=VALUE"),
        ("snapkv+knorm", DoesNotCompose, "both need the part 'evict'"),
    ],
)
def test_what_cannot_be_read_is_said(spec, error, words):
    with pytest.raises(error, match=words):
        parse(spec)


def test_random_joins_once_for_each_part_in_use():
    field = with_baselines([parse("snapkv"), parse("minference")], ("random", "streaming"))
    assert [c.label for c in field] == ["full", "snapkv", "minference", "random", "random:part=prefill", "streaming"]
    assert with_baselines([parse("streaming")], ("random", "streaming"))[1:] == [parse("streaming")]
    packed = with_baselines([parse("snapkv+kivi"), parse("kivi")], ("random",))
    assert [c.label for c in packed] == ["full", "snapkv+kivi", "kivi", "random"]


def test_those_take_part_by_default_whose_cards_say_so_and_no_baseline():
    names = [c.label for c in usual()]
    assert {"snapkv", "minference", "double-sparsity", "duo-attention", "knorm"} <= set(names)
    assert not [n for n in names if card(n).baseline or card(n).family not in ATTACHED]


def test_a_family_is_all_of_its_methods_but_baselines():
    names = of_families(["cache", "decode"])
    assert {card(n).family for n in names} == {"cache", "decode"} and {"h2o", "quest"} <= set(names)
    assert "streaming" not in names and "minference" not in names
    with pytest.raises(UnknownName, match="family to compare"):
        of_families(["probes"])
    assert of_families(["cache", "decode"], ["h2o"]) == [name for name in names if name != "h2o"]
    with pytest.raises(UnknownName, match="method of these families to leave out 'quest'"):
        of_families(["cache"], ["quest"])


@pytest.mark.parametrize(
    "name, one_pass, served", [("snapkv", True, False), ("minference", True, True), ("snapkv", False, True)]
)
def test_a_single_pass_has_nothing_for_a_cache_method_to_do(name, one_pass, served):
    assert parse(name).exercised(one_pass) is served
    assert Contestant().exercised(one_pass)


def test_identity_depends_on_options_and_source(monkeypatch, tmp_path):
    plain, other = parse("snapkv"), parse("snapkv:window_tokens=8")
    assert plain.identity() == parse("snapkv").identity() != other.identity()
    edited = tmp_path / "snapkv.py"
    edited.write_text("# another version")
    before = plain.identity()
    monkeypatch.setattr("saccade.measure.contestants.inspect.getfile", lambda cls: str(edited))
    assert plain.identity() != before


def test_what_only_looks_on_is_not_compared():
    said = r"compare 'retrieval-head': it only looks on, so that nothing could differ from full\. Attach it, or see"
    with pytest.raises(BadOption, match=said):
        with_baselines([parse("retrieval-head")], ["random"])
