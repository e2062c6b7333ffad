"""What vLLM can and cannot do of a method, and what its plug-in (plugins/vllm) is told. Needs no vLLM.

Everything here is read off a method: its parts, and the flags by which the library's own engine runs it.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, CannotRun
from saccade.core.method import Cache, Decode, Method, Mixer, Sparse, made, options
from saccade.core.paths import SHIPPED

MINOR = "0.32"  # of vLLM, which the plug-in is written against
KEY = "saccade"  # under which vLLM's additional_config holds our settings

# why vLLM cannot, for a whole kind of method
TRAINED = "it is a layer that is trained in a net of its own, not one of a loaded model"
WATCHES = "it keeps notes beside every token of a model's own attention, and vLLM has no place for them"
PACKS = "it packs keys and values into a form of its own, and a block of vLLM holds them as they are"
SCORES = "which keys go depends on keys and queries; the scheduler frees blocks, and sees neither"
MERGES = "a kept key stands for several, and a block of vLLM has no place for how many"
REREADS = "it has tokens read a second time, and vLLM's scheduler has each read once"
SHELVES = "it moves keys to host memory, and vLLM's blocks all lie on one device"
# why the plug-in does not, though vLLM could
TURNS = "the plug-in does not yet tell it how queries move along the text"
UNSAID = "the plug-in frees by first and recent tokens, which this method does not say in numbers"
OTHER = "the plug-in has no hooks for the part {!r}"
# why nobody has seen it
UNLEARNED = "it learns from a model, and nothing that it learned is shipped: no test has run it in vLLM"

SERVED = {"prefill", "decode", "evict"}
Answer = Literal["yes", "untried", "not yet", "no"]
SEEN = ("full", "minference", "quest")  # in a vLLM on CUDA: benchmarks/results/vllm-cuda-*.txt
ON_CUDA = {
    "yes": "seen once on an H200, eager and in float32: every layer answered as the library's",
    "untried": f"untried; the code is the same, and {', '.join(SEEN)} were seen to be right there",
}


@dataclass(frozen=True)
class Verdict:
    """Whether the plug-in serves a method in vLLM on CPU, what that saves there, or every reason why not.

    "yes": it does, as its tests show of all of ours. "untried": the same code should run it, and nobody has seen it
    "not yet": vLLM could, the plug-in does not. "no": vLLM cannot
    served_as: of one that is not served, the same with other options that is
    """

    serves: Answer
    on_cuda: Answer
    saves: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    served_as: str = ""

    @property
    def starts(self) -> bool:
        """Whether the plug-in lets it."""
        return self.serves in ("yes", "untried")


def verdict(method: Method | type[Mixer]) -> Verdict:
    """What vLLM can do of a method with these options."""
    never, later = _against(method)
    if never or later:
        other = "" if isinstance(method, type) else _served_as(method)
        answer = "no" if never else "not yet"
        return Verdict(answer, answer, reasons=(*never, *later), served_as=other)
    assert isinstance(method, Method), "a mixer has a reason"
    if method.card.calibrated and not (SHIPPED / method.card.name).exists():
        return Verdict("untried", "untried", _saves(method), (UNLEARNED,))
    return Verdict("yes", "yes" if method.card.name in SEEN else "untried", _saves(method))


def _served_as(method: Method) -> str:
    """The fewest options to change among those with a few values each, so that it is served; "": none will do."""
    hints = typing.get_type_hints(type(method))
    few = {name: _values(hints[name]) for name in options(method)}
    few = {name: values for name, values in few.items() if values}
    for count in range(1, len(few) + 1):
        for names in itertools.combinations(few, count):
            for values in itertools.product(*(few[name] for name in names)):
                changes = dict(zip(names, values))
                if not any(_against(dataclasses.replace(method, **changes))):
                    return f"{method.card.name}:" + ",".join(f"{n}={str(v).lower()}" for n, v in changes.items())
    return ""


def _values(hint: Any) -> tuple[Any, ...]:
    """What an option may be, where that is a short list."""
    return (True, False) if hint is bool else typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _against(method: Method | type[Mixer]) -> tuple[list[str], list[str]]:
    """Reasons of vLLM, and reasons of the plug-in."""
    if isinstance(method, type):
        return [TRAINED], []
    never = [WATCHES] * ("observe" in method.parts) + [PACKS] * ("pack" in method.parts)
    later = [OTHER.format(part) for part in method.parts if part not in SERVED | {"observe", "pack"}]
    if isinstance(method, Cache) and "evict" in method.parts:
        never += [MERGES] * method.merges
        if not method.rolling or method.weighing or method.tallies:
            never.append(SCORES)
        elif type(method).reach is Cache.reach:
            later.append(UNSAID)
    if isinstance(method, Decode):
        never += [REREADS] * bool(method.reread_tokens) + [SHELVES] * method.shelves
    return never, later + [TURNS] * _turns(method)


def _turns(method: Method) -> bool:
    """Whether it goes by how queries move along the text: said in its source alone, where an artefact is wanting."""
    return "site.turn" in inspect.getsource(type(method))


def _saves(method: Method) -> tuple[str, ...]:
    parts = set(method.parts)
    reads = "weighed: a new query weighs fewer keys" if isinstance(method, Sparse) else "reads: a new query reads fewer"
    return (
        *["memory: blocks that no head of a layer group sees any more are freed"] * ("evict" in parts),
        *[reads] * ("decode" in parts),
        *["prefill: fewer pairs are computed"] * ("prefill" in parts),
    )


@dataclass(frozen=True)
class Settings:
    """What the plug-in is told, as `additional_config={"saccade": {...}}` of vLLM.

    method: as `attach` takes it, "NAME:OPTION=VALUE,..."; budget: the same
    fingerprint: of the model, by which artefacts are found; vLLM's weights lie otherwise, and do not tell it
    """

    method: str
    budget: str = "1"
    seed: int = 0
    fingerprint: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Settings | None:
        """From vLLM's additional_config; None: nothing is said of saccade there."""
        given = (config or {}).get(KEY)
        return None if given is None else cls.read(given)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """From what vLLM was given.

        Raises:
            BadOption: a name that is none of these, or no method.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        odd = sorted(set(given) - set(known))
        if odd or "method" not in given:
            found = f"it has {', '.join(odd)}" if odd else "it names no method"
            raise BadOption(f"vLLM's additional_config[{KEY!r}]", found, f"It takes: {', '.join(known)}.")
        return cls(**given)

    def equipped(self) -> Method:
        """The method, with the artefact that belongs to the model.

        Raises:
            CannotRun: vLLM or the plug-in does not serve it, with every reason.
            UnknownName, BadOption, BadBudget: nobody has that method, or not so.
        """
        method, _ = made(self.method), Budget.of(self.budget)
        found = verdict(method)
        if not found.starts:
            raise CannotRun(f"serve {self.method!r} with vLLM", found.reasons, "See: saccade export --to vllm")
        if not method.card.calibrated:
            return method
        if not self.fingerprint:
            found, do = "it needs an artefact, and no fingerprint says whose", "See: saccade export METHOD --to vllm"
            raise CannotRun(f"serve {self.method!r} with vLLM", found, do)
        return dataclasses.replace(method, artefact=Artefact.find(method.card.name, self.fingerprint))


def launch(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` that the plug-in needs, the settings among them.

    A prompt is read at once, as the methods are told where it ends, and no block is shared between requests: blocks
    that are freed in one would be missing in another.
    """
    config = {k: v for k, v in dataclasses.asdict(settings).items() if v != ""}
    return {
        "additional_config": {KEY: config},
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
    }
