"""Text that grows: every letter once and whole, cut at the first stop string, which nobody sees the beginning of."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade import models
from saccade.engines.serve.text import HALF, Text


class Bytes:
    """A tokenizer whose tokens are bytes: most letters come in pieces. Byte 0 is a special token."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(i for i in ids if i).decode(errors="replace")


letters = st.text(st.sampled_from("abcäß語🐋 "), max_size=24)
stops = st.lists(st.text(st.sampled_from("abä🐋 "), min_size=1, max_size=3), max_size=3)


def grown(data: bytes, stop=()) -> tuple[list[str], Text]:
    text, pieces = Text(Bytes(), stop), []
    for byte in data:
        pieces.append(text.add(byte))
        if text.stopped:
            break
    return [*pieces, text.end()], text


def cut(text: str, stop) -> str:
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places)] if places else text


@given(letters)
def test_every_letter_comes_once_and_whole(text):
    pieces, _ = grown(text.encode())
    assert "".join(pieces) == text and not any(HALF in p for p in pieces)


@given(letters, stops)
def test_nothing_comes_from_the_first_stop_on(text, stop):
    pieces, made = grown(text.encode(), stop)
    # the text ends where the first stop string is complete: one that begins earlier may not be there yet
    complete = min((text.find(s) + len(s) for s in stop if s in text), default=len(text))
    assert "".join(pieces) == cut(text[:complete], stop)
    assert made.stopped == any(s in text for s in stop)


@given(letters, stops)
def test_what_is_shown_is_never_taken_back(text, stop):
    pieces, _ = grown(text.encode(), stop)
    whole = "".join(pieces)
    for i in range(len(pieces)):
        assert whole.startswith("".join(pieces[:i]))


@given(letters, st.integers(1, 3))
def test_half_a_letter_at_the_end_is_left_out(text, missing):
    whole = (text + "🐋").encode()
    pieces, _ = grown(whole[: len(whole) - missing])
    assert "".join(pieces) == text


def test_special_tokens_say_nothing():
    assert grown(b"a\0b\0")[0] == ["a", "", "b", "", ""]


def test_what_may_begin_a_stop_waits():
    assert grown(b"abx", ["bc"])[0] == ["a", "", "bx", ""]
    assert grown(b"ab", ["bc"])[0] == ["a", "", "b"]


@pytest.mark.slow
@given(st.text(max_size=30))
def test_with_a_real_tokenizer_it_is_the_text_that_decode_gives(text):
    if not models.is_cached("smollm2"):
        pytest.skip("the default model has not been fetched")
    tokenizer = real()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    made = Text(tokenizer)
    grown = "".join([*map(made.add, ids), made.end()])
    assert grown == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).rstrip(HALF)


@functools.cache
def real():
    return models.load("smollm2")[1]
