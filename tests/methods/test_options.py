"""The options of every method: a value that cannot be is refused in words, and so is a foreign artefact."""

from __future__ import annotations

import functools
import typing

import pytest

from saccade.attach import attach
from saccade.core.artefact import Artefact
from saccade.core.errors import BadOption, CannotRun
from saccade.core.method import Mixer, Slot, options
from saccade.core.registry import get, list_methods
from tests.methods.handmade import tiny

BAD = {int: (-1, 1.5, True, "3"), bool: ("yes", 2)}
SAID = {int: "it takes a whole number from 0", bool: "it takes True or False"}
HERE = [name for name in list_methods() if get(name).__module__.startswith("saccade.")]


@pytest.mark.parametrize("name", HERE)
def test_no_option_takes_what_it_cannot_be(name):
    method, hints = get(name), typing.get_type_hints(get(name))
    if issubclass(method, Mixer):
        method, hints = functools.partial(method, Slot(16)), typing.get_type_hints(method.__init__)
    for option in options(get(name)):
        literal = typing.get_origin(hints[option]) is typing.Literal
        for value in ("nothing",) if literal else BAD.get(hints[option], ()):
            said = "it takes .+ or .+" if literal else SAID[hints[option]]
            with pytest.raises(BadOption, match=rf"{name}\.{option}={value!r}: {said}\. Give"):
                method(**{option: value})


@pytest.mark.parametrize("name", [name for name in HERE if get(name).card.calibrated])
def test_an_artefact_of_another_method_or_model_is_refused(name):
    foreign = Artefact("other", {}, "some model", "0")
    with pytest.raises(CannotRun, match=rf"attach '{name}': the artefact it was given is one of 'other'. Make one"):
        attach(tiny(), get(name)(artefact=foreign), budget=0.5)
    strange = Artefact(name, {}, "some model", "0")
    with pytest.raises(CannotRun, match=r"its artefact was made for some model \(0\), this model is [0-9a-f]{12}"):
        attach(tiny(), get(name)(artefact=strange), budget=0.5)


@pytest.mark.parametrize("name", [name for name in HERE if get(name).card.calibrated])
def test_without_an_artefact_a_method_says_how_to_make_one_or_has_a_default(name):
    model = tiny()
    if name == "minference" or get(name).card.family == "probes":  # it has a default; it is what a probe finds
        attach(model, name, budget=0.5).detach()
        return
    with pytest.raises(CannotRun, match=f"saccade calibrate {name}"):
        attach(model, name, budget=0.5)
