"""Put methods into a loaded model and take them out again. This folder and `models/` alone import transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from saccade.attach import compat, replay, sequence
from saccade.attach.fingerprint import fingerprint
from saccade.attach.probe import Found, probe
from saccade.attach.run import Run
from saccade.attach.watch import Watch
from saccade.core.artefact import Artefact
from saccade.core.budget import FULL, Budget
from saccade.core.errors import CannotRun, DoesNotCompose, SaccadeError
from saccade.core.method import Method, compose, made
from saccade.core.site import Site

__all__ = ["Run", "attach", "calibrate", "explain", "fingerprint", "replace"]

Methods = str | Method | Sequence[str | Method]

# parts whose hooks this version attaches; a method that needs another is refused
SERVED = ("prefill", "evict", "pack", "decode", "observe")


def attach(
    model: Any, methods: Methods, *, budget: float | str | Budget = FULL, seed: int = 0, graph_tokens: int = 0
) -> Run:
    """Let methods work in a loaded model: `with saccade.attach(model, "snapkv", budget=0.25): model.generate(...)`.

    methods: a name, a Method with its options, or a list of those that own different parts.
    budget: what may be kept: 0.25, "4096tok", "2GiB".
    seed: root of the random streams of methods that draw.
    graph_tokens: on a CUDA device, a step is captured as a graph that serves so many tokens, 128 say. What
        was decoded since the capture is read as a whole, beside what the methods choose. 0: no graph.

    Raises:
        UnknownName: no method of that name.
        BadBudget: a budget that is none.
        DoesNotCompose: two methods need the same part.
        CannotRun: with every reason why.
    """
    return attach_found(model, methods, Budget.of(budget), seed, probe(model), graph_tokens)


def attach_found(model: Any, methods: Methods, budget: Budget, seed: int, found: Found, graph_tokens: int = 0) -> Run:
    """As `attach`, for who attaches many to one model: a probe has found out what there is to know of it."""
    found = sequence.shared(model, found)
    chosen = [_equipped(model, m, found) for m in _as_list(methods)]
    reasons = _reasons(model, chosen, budget, found)
    if graph_tokens:
        why = replay.why_not(model, compose(chosen), graph_tokens, shared=found.shard.ranks > 1 or bool(found.sharing))
        reasons += [f"graph_tokens={graph_tokens}: {reason}" for reason in why]
    if reasons:
        title = " + ".join(m.card.name for m in chosen)
        raise CannotRun(f"attach {title!r} to {type(model).__name__}", reasons, "See also: saccade explain")
    run = Watch if "observe" in compose(chosen) else Run
    return run(model, chosen, budget, seed, found, graph_tokens)._enter()


def explain(model: Any, methods: Methods, *, budget: float | str | Budget = FULL) -> list[str]:
    """Every reason why the methods cannot work in the model; [] means that they will."""
    return refusals(model, methods, Budget.of(budget), sequence.shared(model, probe(model)))


def refusals(model: Any, methods: Methods, budget: Budget, found: Found) -> list[str]:
    """As `explain`, for who asks much of one model: a probe has found out what there is to know of it."""
    try:
        return _reasons(model, [_equipped(model, m, found) for m in _as_list(methods)], budget, found)
    except DoesNotCompose as e:
        return e.found


def calibrate(model: Any, method: str | Method, samples: Sequence[Any], progress: Any = None) -> Artefact:
    """Let a method learn what it needs from a model, and keep it where `attach` finds it.

    samples: rows of token ids [1 n]. Returns the artefact; it is saved in the cache folder. What a method that trains
    has done when it is interrupted is kept, and the same call goes on there.

    Raises:
        CannotRun: the method has nothing to learn, or the model is not served.
    """
    from saccade.attach.calibration import Subject
    from saccade.core.paths import cache_dir

    chosen = made(method) if isinstance(method, str) else method
    artefact = chosen.calibrate(Subject(model, cache_dir("drafts")), samples, progress)
    artefact.save(cache_dir("artefacts", artefact.method, artefact.fingerprint))
    return artefact


def replace(model: Any, layers: Sequence[int], mixer: str) -> Any:
    """Swap attention layers for a trainable mixer.

    Raises:
        CannotRun: this version trains mixers in its own nets alone.
    """
    found = "layers of a loaded model are not swapped in this version"
    raise CannotRun(f"replace layers {list(layers)} by {mixer!r}", found, "Train it in a small net: saccade train")


def _as_list(methods: Methods) -> list[str | Method]:
    return [methods] if isinstance(methods, (str, Method)) else list(methods)


def _equipped(model: Any, method: str | Method, found: Found) -> Method:
    """The method, with the artefact that belongs to this model."""
    chosen = made(method) if isinstance(method, str) else method
    if not chosen.card.calibrated or not found.sites:  # no sites: it is refused, and need not have weights to know
        return chosen
    mark = fingerprint(model)
    if chosen.artefact is None:
        return dataclasses.replace(chosen, artefact=Artefact.find(chosen.card.name, mark))
    if chosen.artefact.method != chosen.card.name:
        found = f"the artefact it was given is one of {chosen.artefact.method!r}"
        raise CannotRun(f"attach {chosen.card.name!r}", found, f"Make one: saccade calibrate {chosen.card.name}")
    if chosen.artefact.fingerprint != mark:
        raise CannotRun(
            f"attach {chosen.card.name!r} to {type(model).__name__}",
            f"its artefact was made for {chosen.artefact.model} ({chosen.artefact.fingerprint}), this model is {mark}",
            f"Make one: saccade calibrate {chosen.card.name}",
        )
    return chosen


def _not_to_watch(model: Any, probe: Method, methods: Sequence[Method]) -> list[str]:
    """Why a probe cannot look on: it sees the model's own attention, and only such as is then computed bit for bit."""
    reasons = []
    others, own = [m.card.name for m in methods if m is not probe], compat.implementation(model)
    if others:
        reasons.append(f"{probe.card.name} looks on at the model's own attention, not at {' + '.join(others)}")
    if own not in compat.OWN:
        reasons.append(f"its attention is computed by {own!r}; a probe looks on at {' or '.join(compat.OWN)}")
    return reasons


def _reasons(model: Any, methods: Sequence[Method], budget: Budget, found: Found) -> list[str]:
    reasons = list(found.reasons)
    if getattr(model, "_saccade_run", None) is not None:
        reasons.append(f"{model._saccade_run.title} is attached already; detach it, or attach a list of both")
    if budget != FULL and methods and not any(m.card.takes_budget for m in methods):
        name = methods[0].card.name
        reasons.append(f"{name} packs all tokens and drops none: attach it without a budget, or beside what takes one")
    reasons += sequence.refusals(methods, found.sharing)
    parts = compose(methods)
    for part, method in parts.items():
        if part not in SERVED:
            reasons.append(f"{method.card.name} owns the part {part!r}, whose hooks this version does not have")
    if "observe" in parts and found.sites:
        reasons += _not_to_watch(model, parts["observe"], methods)
    for spot in found.sites:
        place = dataclasses.asdict(spot.place)
        length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 4096)
        site = Site(**place, stage="prefill", queries=length, keys=length, seen=length, budget=budget,
                    bytes_per_token=found.bytes_per_token, shard=found.shard)  # fmt: skip
        for method in methods:
            try:
                reasons += method.check(site)
            except SaccadeError as e:
                reasons.append(str(e))
    return list(dict.fromkeys(reasons))
