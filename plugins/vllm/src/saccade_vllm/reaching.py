"""What each head of a layer still sees, in numbers: all that a scheduler needs to free blocks. Needs no vLLM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from saccade.core.method import Method
from saccade.core.site import Site
from saccade.engines.vllm import Settings

Reach = list[tuple[int, int]]  # of each key/value head: first tokens, and tokens before the query


def gap(method: Method, sites: Sequence[Site], prompt: int, position: int) -> tuple[int, int]:
    """The tokens [first, last) that a query at a position sees in no head of these layers."""
    pairs = [pair for site in sites for pair in reach(method, site, prompt, position)]
    return max(sinks for sinks, _ in pairs), max(0, min(position - recent for _, recent in pairs))


def reach(method: Method, site: Site, prompt: int, position: int) -> Reach:
    """What a query at a position sees, in each key/value head, after a prompt of so many tokens."""
    state = {"prompt": torch.tensor([prompt])}  # what methods remember of a prompt, if anything, is its length
    asked = dataclasses.replace(
        site, stage="decode", queries=1, keys=position + 1, seen=position + 1, state=state, settled=False
    )
    found = method.reach([position], asked)
    assert found is not None, "methods that do not say it in numbers are refused"
    return found[0]


@functools.lru_cache(maxsize=1)
def freed_together(settings: Settings, sites: tuple[Site, ...], longest: int) -> tuple[int, ...]:
    """The layers in which, after the longest prompt, every head lets go of something: a group of their own."""
    method = settings.equipped()
    if "evict" not in method.parts:
        return ()
    return tuple(s.layer for s in sites if all(recent < longest for _, recent in reach(method, s, longest, longest)))
