"""What vLLM can and cannot do of a method, and what its plug-in (plugins/vllm) is told. Needs no vLLM.

Everything here is read off a method: its parts, and the flags by which the library's own engine runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, CannotRun
from saccade.core.method import Cache, Decode, Method, Mixer, made

MINOR = "0.32"  # of vLLM, which the plug-in is written against
KEY = "saccade"  # under which vLLM's additional_config holds our settings

# why vLLM cannot, for a whole kind of method
TRAINED = "it is a layer that is trained in a net of its own, not one of a loaded model"
WATCHES = "it keeps notes beside every token of a model's own attention, and vLLM has no place for them"
PACKS = "it packs keys and values into a form of its own, and a block of vLLM holds them as they are"
SCORES = (
    "which keys go depends on keys and queries, which the worker sees; blocks are freed by the scheduler, another process"
)
MERGES = "a kept key stands for several, and a block of vLLM has no place for how many"
REREADS = "it has tokens read a second time, and vLLM's scheduler has each read once"
SHELVES = "it moves keys to host memory, and vLLM's blocks all lie on one device"
# why the plug-in does not, though vLLM could
BEGINS = "the plug-in does not yet show it the last queries of the prompt"
HANDS = "the plug-in does not yet hand on from layer to layer what it chose"
UNSAID = "the plug-in frees by first and recent tokens, which this method does not say in numbers"
OTHER = "the plug-in has no hooks for the part {!r}"

SERVED = {"prefill", "decode", "evict"}


@dataclass(frozen=True)
class Verdict:
    """Whether the plug-in serves a method in vLLM, what that saves there, or every reason why not.

    "not yet": vLLM could, the plug-in does not. "no": vLLM cannot
    """

    serves: Literal["yes", "not yet", "no"]
    saves: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def verdict(method: Method | type[Mixer]) -> Verdict:
    """What vLLM can do of a method with these options."""
    never, later = _against(method)
    if never or later:
        return Verdict("no" if never else "not yet", reasons=(*never, *later))
    assert isinstance(method, Method), "a mixer has a reason"
    return Verdict("yes", saves=_saves(method))


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
        later += [BEGINS] * bool(method.observe_tokens and not method.shelves) + [HANDS] * method.persistent
    return never, later


def _saves(method: Method) -> tuple[str, ...]:
    parts = set(method.parts)
    memory = ("memory: blocks that no head of a layer group sees any more are freed",) * ("evict" in parts)
    return (
        memory
        + ("reads: a new query reads the keys it chose",) * ("decode" in parts)
        + ("prefill: it computes fewer pairs",) * ("prefill" in parts)
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
        if found.serves != "yes":
            raise CannotRun(f"serve {self.method!r} with vLLM", found.reasons, "See: saccade export --to vllm")
        if not method.card.calibrated:
            return method
        if not self.fingerprint:
            do = "Get it with: saccade export METHOD --to vllm --model MODEL"
            raise CannotRun(f"serve {self.method!r} with vLLM", "it needs an artefact, and no fingerprint says whose", do)
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
