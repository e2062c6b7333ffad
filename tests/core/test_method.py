"""Options, their checks and their reading from text; cards; composition by part."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.core import card as cards
from saccade.core.card import Card
from saccade.core.errors import BadOption, CannotRun, DoesNotCompose
from saccade.core.method import PARTS, Cache, Decode, Method, Sparse, compose, configure, options
from saccade.core.site import Site


def named(name: str, family: str = "cache", **more) -> Card:
    return Card(name=name, title=name, family=family, paper="", year=2024, summary="a test", **more)


@dataclass(frozen=True)
class Made(Cache):
    card = named("made")

    window_tokens: int = 8
    share: float = 0.5
    how: Literal["max", "mean"] = "max"
    bits: Literal[2, 4] = 2
    dense: bool = False
    cap_tokens: int | None = None


@dataclass(frozen=True)
class Looks(Sparse):
    card = named("looks", "sparse")


@dataclass(frozen=True)
class Reads(Decode):
    card = named("reads", "decode")


@dataclass(frozen=True)
class Both(Cache):
    card = named("both")

    @property
    def parts(self):
        return ("evict", "prefill")


def test_options_are_the_fields_without_the_artefact():
    assert list(options(Made)) == ["window_tokens", "share", "how", "bits", "dense", "cap_tokens"]
    assert options(Made(window_tokens=3)) == {**options(Made), "window_tokens": 3}


@given(st.integers(0, 999), st.floats(0, 1), st.sampled_from(["max", "mean"]), st.sampled_from([2, 4]),
       st.booleans(), st.integers(0, 9))  # fmt: skip
def test_options_are_read_from_text_as_from_values(window, share, how, bits, dense, cap):
    values = {"window_tokens": window, "share": share, "how": how, "bits": bits, "dense": dense, "cap_tokens": cap}
    made = configure(Made(), values)
    assert made == configure(Made(), {k: str(v) for k, v in values.items()}) == Made(**values)
    assert configure(made, {"cap_tokens": "none"}).cap_tokens is None
    assert configure(made, {}) == made


def test_configuring_leaves_the_artefact():
    kept = configure(dataclasses.replace(Made(), artefact="it"), {"share": "0.25"})
    assert kept.artefact == "it" and kept.share == 0.25


@pytest.mark.parametrize(
    ("name", "text", "takes"),
    [
        ("window_tokens", "many", "it takes int"),
        ("share", "half", "it takes float"),
        ("how", "min", "it takes 'max' or 'mean'"),
        ("bits", "3", "it takes 2 or 4"),
        ("dense", "yes", "it takes bool"),
        ("cap_tokens", "x", r"it takes int \| None"),
    ],
)
def test_text_of_another_type_is_refused(name, text, takes):
    with pytest.raises(BadOption, match=rf"made\.{name}='{text}': {takes}\. Give such a value\."):
        configure(Made(), {name: text})


def test_an_unknown_option_says_the_nearest_and_all():
    said = r"option 'window' of made: there is none of that name\. Did you mean 'window_tokens'\? It has: window_tokens"
    with pytest.raises(BadOption, match=said):
        configure(Made(), {"window": 3})
    with pytest.raises(BadOption, match=r"there is none of that name\. It has: window_tokens, share, how, bits, dense"):
        configure(Made(), {"zzz": 3})


def test_values_outside_what_an_option_allows_are_refused():
    for bad in (-1, 2.5, True):
        with pytest.raises(BadOption, match=rf"made\.window_tokens={bad}: it takes a whole number from 0\. Give such"):
            Made(window_tokens=bad)
    with pytest.raises(BadOption, match=r"made\.how='min': it takes 'max' or 'mean'\. Give one of these\."):
        Made(how="min")


def test_what_learns_nothing_says_so():
    with pytest.raises(CannotRun, match=r"calibrate made: it has nothing to learn\. Attach it as it is\."):
        Made().calibrate(None, [])


@given(st.permutations([Looks(), Made(), Reads()]))
def test_composition_does_not_depend_on_the_users_order(methods):
    owners = compose(methods)
    assert list(owners) == ["prefill", "evict", "decode"] and list(owners) == [p for p in PARTS if p in owners]
    assert {part: m.card.name for part, m in owners.items()} == {"prefill": "looks", "evict": "made", "decode": "reads"}


@pytest.mark.parametrize("rival", [Looks(), Made()])
def test_two_owners_of_a_part_are_both_named(rival):
    part = rival.parts[0]
    said = rf"attach \[both, {rival.card.name}\] together: both need the part '{part}'\. Leave one of them out\."
    with pytest.raises(DoesNotCompose, match=said):
        compose([Both(), rival])


@dataclass(frozen=True)
class Persists(Decode):
    persistent: ClassVar[bool] = True
    card = named("persists", "decode")


@dataclass(frozen=True)
class Rereads(Decode):
    card = named("rereads", "decode")

    @property
    def reread_tokens(self):
        return 9


@dataclass(frozen=True)
class Shelves(Decode):
    shelves: ClassVar[bool] = True
    card = named("shelves", "decode")


@pytest.mark.parametrize("reader", [Persists(), Rereads(), Shelves()])
def test_who_counts_on_equal_layers_composes_with_no_eviction(reader):
    assert list(compose([Looks(), reader])) == ["prefill", "decode"]
    name = reader.card.name
    said = (
        rf"attach \[{name}, made\] together: '{name}' counts on all keys being there in every layer, and 'made'"
        r" drops some\. Leave one of them out\."
    )
    for methods in ([Made(), reader], [reader, Made()]):
        with pytest.raises(DoesNotCompose, match=said):
            compose(methods)


@dataclass(frozen=True)
class Merges(Cache):
    card = named("merges")

    @property
    def merges(self):
        return True


def test_what_is_merged_is_read_by_none_that_chooses_keys():
    said = r"attach \[merges, reads\] together: 'merges' stores keys that stand for several tokens, and 'reads' would"
    for both in ([Merges(), Reads()], [Reads(), Merges()]):
        with pytest.raises(DoesNotCompose, match=said):
            compose(both)
    assert list(compose([Merges(), Looks()])) == ["prefill", "evict"]


def site(budget, **more) -> Site:
    from saccade.core.budget import Budget

    shape = {"layer": 0, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "stage": "prefill"}
    return Site(**shape, queries=3, keys=9, seen=9, scale=1.0, budget=Budget.of(budget), **more)


def test_pairs_have_no_bytes():
    said = ["it leaves out pairs, not memory, and the budget 1024B is in bytes; give a fraction or tokens"]
    assert Looks().check(site("1KiB")) == said
    assert Looks().check(site(0.5)) == Looks().check(site("4tok")) == Method.check(Made(), site("1KiB")) == []


@given(st.floats(0.01, 1), st.integers(1, 200))
def test_a_cache_keeps_the_same_in_every_head_unless_it_says_otherwise(share, n):
    at = dataclasses.replace(site(share), seen=n)
    kept = Made().allocate(torch.zeros(2, 3, n), at.budget, at)
    assert kept.shape == (2, 3) and (kept == at.budget.tokens(n)).all()


def test_a_site_knows_its_shape_and_computes_only_when_attached():
    assert (site(1.0).offset, site(1.0).group) == (6, 2)
    with pytest.raises(AssertionError, match=r"this Site was made without an attachment; give Site\(attend=\.\.\.\)"):
        site(1.0).attend(None, None, None, None)


def test_cards_are_checked():
    with pytest.raises(AssertionError, match="made: family 'caches'"):
        named("made", "caches")
    with pytest.raises(AssertionError, match="made: a missing property needs a reason"):
        named("made", lacks={"chunks": ""})
    assert named("made").link == ""
    assert dataclasses.replace(named("made"), paper="arXiv:2404.14469").link == "https://arxiv.org/abs/2404.14469"
    assert len(cards.PROPERTIES) == len(set(cards.PROPERTIES)) == 15
