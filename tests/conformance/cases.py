"""What is put to the test: every registered method as it comes, and once for every other value of its choices.

A case is written as on the command line: `snapkv`, `snapkv:pooling=avg`. Nothing here names a method: a new file in
`methods/` is a new case.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach import attach, fingerprint, refusals
from saccade.attach.calibration import Subject
from saccade.attach.probe import probe
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.method import Method, options
from saccade.core.registry import card, get, list_methods
from tests.methods.handmade import tokens

ATTACHED = ("sparse", "cache", "decode", "probes")  # the families that `attach` serves
FRACTIONS = (0.05, 0.25, 0.5, 0.75, 0.9)
TOKENS = ("1tok", "6tok", "20tok")
LONG = st.integers(16, 88)
ANY = st.sampled_from([1, 2, 3, 5, 9, 17]) | LONG  # among them one more than the sizes below
LAYERS = 2
# the same examples every time, so that a verdict is repeatable; as they come, since making them smaller takes minutes
FEW = settings(max_examples=3, derandomize=True, deadline=None, phases=[Phase.generate])
ATTACH = sys.modules[attach.__module__]  # the name of the package is the function, too
look = functools.cache(probe)
SMALL_TOKENS = 8  # options in tokens are cut to this, so that a context of tens of tokens is a long one


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with one of its choices changed, or none."""

    name: str
    option: str = ""
    value: Any = None

    def __str__(self) -> str:
        return f"{self.name}:{self.option}={str(self.value).lower()}" if self.option else self.name

    @property
    def card(self) -> Card:
        """What the method says of itself."""
        return card(self.name)

    def method(self, small: bool = True) -> Method:
        """With this case's choice, in the sizes of a tiny model: no whole layers, and few tokens if `small`."""
        made = get(self.name)()
        for name, value in options(made).items():
            if name == self.option:
                made = dataclasses.replace(made, **{name: self.value})
            elif name.endswith("_layers"):
                made = dataclasses.replace(made, **{name: 0})
            elif small and name.endswith("_tokens") and value > SMALL_TOKENS:
                made = dataclasses.replace(made, **{name: SMALL_TOKENS})
        return made

    @property
    def parts(self) -> tuple[str, ...]:
        """What the method takes over."""
        return _parts(self)

    @property
    def budgets(self) -> tuple[float | str, ...]:
        """Budgets below all that it takes. None where its sizes are fixed otherwise, as its `check` then says."""
        return _budgets(self)


@functools.cache
def _parts(case: Case) -> tuple[str, ...]:
    return case.method().parts


@functools.cache  # every test has its own list of equal cases
def _budgets(case: Case) -> tuple[float | str, ...]:
    choice = FRACTIONS if case.option.endswith("_layers") else FRACTIONS + TOKENS
    model = tiny(4, 2, 16)
    method = equipped(case.method(), model)
    return tuple(b for b in choice if not refusals(model, method, Budget.of(b), look(model)))


def layers() -> list[Case]:
    """The registered layers that are trained, and attention over what two methods select, as it comes for them."""
    return [Case(n) for n in [*list_methods(family="mixers"), "full", "streaming"]]


def cases() -> list[Case]:
    """All that attach, in the order of the registry."""
    names = [n for n in list_methods() if card(n).family in ATTACHED]
    return [Case(n, *change) for n in names for change in [(), *_choices(get(n))]]


def _choices(method: type[Method]) -> Iterator[tuple[str, Any]]:
    """(option, value) for every value that is not the default of an option with a handful of values."""
    hints = typing.get_type_hints(method)
    for name, default in options(method).items():
        values = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is Literal else ()
        values = (True, False) if hints[name] is bool else (1,) if name.endswith("_layers") else values
        yield from ((name, value) for value in values if value != default)


def drawn(examples: int = 3) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of a `case` or an `owner` on drawn `data`: so many examples of a method as it comes; half as many, two at
    least, of it with another choice."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        fewer = min(examples, max(2, examples // 2))
        whole, half = (settings(FEW, max_examples=n)(given(data=st.data())(test)) for n in (examples, fewer))

        def run(**fixtures: Any) -> None:
            case = fixtures.get("case") or fixtures["owner"]
            (half if case.option else whole)(**fixtures)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        run.__signature__ = inspect.signature(whole)  # what pytest asks for: without the data
        return run

    return decorate


@functools.cache
def tiny(heads: int, kv_heads: int, head_size: int, dtype: torch.dtype = torch.float64) -> Any:
    """A random Llama of two layers. Float64, so that no rounding turns a choice over and none hides a mistake."""
    return models.tiny("llama", layers=LAYERS, heads=heads, kv_heads=kv_heads, head_size=head_size).to(dtype)


class Words:
    """A tokenizer for calibrations that make texts: a number for each word."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [3 + sum(word.encode()) % 120 for word in text.split()]}


@functools.cache
def _calibrated(name: str, heads: int, kv_heads: int, head_size: int) -> Artefact:
    """By the method's own `calibrate`, as short as it goes."""
    subject = Subject(tiny(heads, kv_heads, head_size, torch.float32))
    subject.tokenizer = Words()
    method = get(name)()
    short = {"train_steps": 2, "least_recall": 0.0}  # a random model answers no question
    short = {option: value for option, value in short.items() if option in options(method)}
    return dataclasses.replace(method, **short).calibrate(subject, [tokens(256, 1)])


def equipped(method: Method, model: Any) -> Method:
    """With an artefact for this tiny model, if it lives by one."""
    if not method.card.calibrated:
        return method
    config = model.config
    shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    artefact = dataclasses.replace(_calibrated(method.card.name, *shape), fingerprint=fingerprint(model))
    return dataclasses.replace(method, artefact=artefact)


@dataclasses.dataclass(frozen=True, repr=False)
class Trial:
    """One example: a method in a model, with a budget, a prompt and what follows it."""

    method: Method
    model: Any
    heads: tuple[int, int, int]
    budget: float | str
    prompt: int
    rest: int
    seed: int

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[2:]} | options(self.method)
        printer.text(f"Trial({self.method.card.name}, {', '.join(f'{k}={v!r}' for k, v in said.items())})")

    def attach(self, anew: bool = False, **changes: Any) -> Any:
        """The run's context manager. The tiny models do not change: what attaching finds in one is found once, unless
        `anew`."""
        said = {"budget": self.budget, "seed": self.seed, **changes}
        with mock.patch.object(ATTACH, "probe", probe if anew else look):
            return attach(self.model, equipped(self.method, self.model), **said)

    def ids(self, rows: int = 1, name: int = 0) -> torch.Tensor:
        """Prompt and rest; another `name`, other tokens."""
        return tokens(self.prompt + self.rest + name, rows)[:, name:]

    @property
    def allowed(self) -> Budget:
        """The budget, read."""
        return Budget.of(self.budget)


@st.composite
def trials(draw: st.DrawFn, case: Case, *, full: bool = False, prompts: st.SearchStrategy[int] = LONG) -> Trial:
    """Examples of a case: head counts and sizes, budgets below all (or all), lengths and seeds."""
    heads = draw(st.sampled_from([(4, 2, 16), (3, 1, 16), (4, 2, 32), (2, 2, 16)]))
    budgets = (1.0,) if full or not case.budgets else case.budgets
    return Trial(
        method=case.method(small=draw(st.integers(0, 3)) > 0),
        model=tiny(*heads),
        heads=heads,
        budget=draw(st.sampled_from(budgets)),
        prompt=draw(prompts),
        rest=draw(st.integers(2, 8)),
        seed=draw(st.integers(0, 3)),
    )

