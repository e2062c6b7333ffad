"""Who is compared: `full`, methods with options, compositions. From names to objects and back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saccade.attach import attach_found, refusals
from saccade.attach.probe import Found, probe
from saccade.core import registry
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, UnknownName
from saccade.core.method import Method, compose, made, options
from saccade.measure.cells import FULL

ATTACHED = ("sparse", "cache", "decode")  # families that work in a loaded model
PART_TITLES = {"prefill": "prefill", "evict": "cache", "pack": "packing", "decode": "decode", "observe": "looking on"}
Spec = str | Method | Sequence[Method]


@dataclass(frozen=True)
class Contestant:
    """One line of a comparison. No methods at all is `full`: the model as it is, with nothing attached."""

    methods: tuple[Method, ...] = ()

    @property
    def names(self) -> str:
        """Registry names, "a+b" where methods compose."""
        return "+".join(m.card.name for m in self.methods) or FULL

    @property
    def label(self) -> str:
        """What tells it apart: names, and the options that are not the defaults. `parse` reads it back."""
        return "+".join(_spec(m) for m in self.methods) or FULL

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model's work that it takes over."""
        return tuple(compose(self.methods))

    @property
    def part(self) -> str | None:
        """The same in words, for tables: "cache", "prefill+decode"; None for full."""
        return "+".join(PART_TITLES.get(p, p) for p in self.parts) or None

    @property
    def baseline(self) -> bool:
        """Proves nothing by itself, but belongs into every comparison."""
        return all(m.card.baseline for m in self.methods)

    @property
    def timed(self) -> bool:
        """Whether its speed is anybody's concern: of full, and of what a paper proposes."""
        return not self.methods or any(m.card.paper for m in self.methods)

    @property
    def takes_budget(self) -> bool:
        """Whether a budget changes anything: not of full, and not of what saves by its options alone."""
        return any(m.card.takes_budget for m in self.methods)

    def exercised(self, one_pass: bool) -> bool:
        """Whether a task has any of its parts to do: a single pass has a prefill and nothing else."""
        return not self.methods or not one_pass or "prefill" in self.parts

    def equipped(self, mark: str) -> Contestant:
        """With the artefacts that belong to the model of this fingerprint, where there are any."""
        return Contestant(tuple(_equipped(m, mark) for m in self.methods))

    def reasons(self, model: Any, budget: Budget, found: Found | None = None) -> list[str]:
        """Why it cannot run in this model; [] means that it will. `found`: by a probe, if there was one already."""
        return refusals(model, list(self.methods), budget, found or probe(model)) if self.methods else []

    @contextlib.contextmanager
    def working(self, model: Any, budget: Budget, seed: int, found: Found | None = None) -> Iterator[Any]:
        """Attach for as long as the block lasts; gives the run, None for full. `found`: as of `reasons`."""
        if not self.methods:
            yield None
            return
        with attach_found(model, list(self.methods), budget, seed, found or probe(model)) as run:
            yield run

    def identity(self) -> list[Any]:
        """What determines its results: names, options, artefacts, and the source of the methods' own files."""
        return [[m.card.name, repr(options(m)), _artefact_mark(m.artefact), _source_mark(m)] for m in self.methods]


def parse(spec: Spec) -> Contestant:
    """Read "full", "snapkv", "snapkv:window_tokens=16,pooling=avg", "minference+snapkv", a Method or several.

    Raises:
        UnknownName: no method of that name.
        BadOption: no such option, or a value it does not take.
        DoesNotCompose: two methods need the same part.
        CannotRun: a layer that is trained, which works in no loaded model.
    """
    if spec == FULL:
        return Contestant()
    if isinstance(spec, str):
        return _composed(tuple(made(part) for part in spec.split("+")))
    return _composed(tuple([spec] if isinstance(spec, Method) else spec))


def _composed(methods: tuple[Method, ...]) -> Contestant:
    compose(methods)
    return Contestant(methods)


def _spec(method: Method) -> str:
    usual = options(type(method))
    changed = [f"{k}={v}" for k, v in options(method).items() if v != usual[k]]
    return method.card.name + (":" + ",".join(changed) if changed else "")


def _equipped(method: Method, mark: str) -> Method:
    if not method.card.calibrated or method.artefact is not None:
        return method
    return dataclasses.replace(method, artefact=Artefact.find(method.card.name, mark))


def _artefact_mark(artefact: Artefact | None) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(artefact.tensors.items()) if artefact else ():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if artefact else ""


def _source_mark(method: Method) -> str:
    return hashlib.sha256(Path(inspect.getfile(type(method))).read_bytes()).hexdigest()[:16]


# --- who takes part by default ----------------------------------------------------------------------------------------


def usual() -> list[Contestant]:
    """The registered methods whose cards say that they are usual in a comparison, with their default options."""
    cards = [registry.card(name) for name in registry.list_methods()]
    return [parse(card.name) for card in cards if card.usual]


def of_families(families: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """Names of all methods of those families that attach to a model, but for baselines and `without`.

    Raises:
        UnknownName: a family that none of them is of, or a method to leave out that is of none of them.
    """
    cards = [registry.card(name) for name in registry.list_methods()]
    there = [card for card in cards if card.family in ATTACHED and not card.baseline]
    for family in families:
        if family not in ATTACHED:
            raise UnknownName("family to compare", family, ATTACHED, "See: saccade list")
    names = [card.name for card in there if card.family in families]
    for name in without:
        if name not in names:
            raise UnknownName("method of these families to leave out", name, names, "See: saccade list")
    return [name for name in names if name not in without]


def with_baselines(chosen: Sequence[Contestant], baselines: Sequence[str]) -> list[Contestant]:
    """`full` first, the chosen, then baselines; of several with one label the first stays.

    `random` joins once for every part that the chosen take over, alone in that part, so that each has its own chance;
    that of packing, which saves memory too, is eviction.

    Raises:
        BadOption: one that only looks on.
    """
    for who in chosen:
        if "observe" in who.parts:
            found = "it only looks on, so that nothing could differ from full"
            raise BadOption(f"compare {who.label!r}", found, "Attach it, or see: saccade calibrate")
    parts = dict.fromkeys("evict" if p == "pack" else p for c in chosen if not c.baseline for p in c.parts)
    more = []
    for name in baselines:
        more += [parse(f"random:part={p}") for p in parts] if name == "random" else [parse(name)]
    every = [Contestant(), *chosen, *more]
    return list({c.label: c for c in reversed(every)}.values())[::-1]
