"""The shipped text, tokenised and cut to size."""

from __future__ import annotations

import functools
from pathlib import Path

from saccade.core import rng
from saccade.core.errors import BadInput

FILE = Path(__file__).parent.parent / "data" / "moby_dick.txt"
GOLDEN = 0.6180339887498949
REACH_TOKENS = 64  # how far back a sentence's end is looked for


@functools.lru_cache(maxsize=1)
def moby_dick() -> str:
    """The first 27 chapters of Moby-Dick, from "Call me Ishmael" on."""
    return FILE.read_text(encoding="utf-8")


def encode(tokenizer, text: str) -> list[int]:
    """Token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@functools.lru_cache(maxsize=4)
def whole(tokenizer) -> tuple[int, ...]:
    """The shipped text as this tokenizer sees it."""
    return tuple(encode(tokenizer, moby_dick()))


def start_token(tokenizer) -> list[int]:
    """What the tokenizer puts before every text: Gemma is lost without its <bos>, others have none."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def room(tokenizer, tokens: int) -> int:
    """At how many places besides the first a passage of so many tokens may begin.

    Raises:
        BadInput: the text has fewer tokens.
    """
    there = len(whole(tokenizer))
    if there < tokens:
        raise BadInput(f"a passage of {tokens} tokens", f"the shipped text has {there}", "Ask for fewer tokens.")
    return there - tokens


def passage(tokenizer, tokens: int, index: int, seed: int) -> tuple[list[int], int]:
    """Sample `index`'s passage: exactly `tokens` ids from the beginning of a sentence on, and where it begins.

    Places follow the golden ratio from a seeded start: any number of them is spread evenly, so overlaps are as small as
    the text allows.

    Raises:
        BadInput: the text has fewer tokens.
    """
    ids, last = whole(tokenizer), room(tokenizer, tokens)
    place = (rng.python("passage", seed).random() + index * GOLDEN) % 1.0
    start = sentence_start(tokenizer, ids, round(place * last))
    return list(ids[start : start + tokens]), start


def sentence_start(tokenizer, ids, position: int) -> int:
    """The last place at or before `position` where a sentence begins; `position` itself where none is near."""
    for at in range(position, max(0, position - REACH_TOKENS), -1):
        if tokenizer.decode([ids[at - 1]]).rstrip().endswith((".", "!", "?", '"')):
            return at
    return 0 if position < REACH_TOKENS else position
