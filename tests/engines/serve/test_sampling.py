"""Choosing tokens: what transformers keeps is what can be drawn, with its probability, row by row."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from saccade.core import rng
from saccade.engines.serve.jobs import Wish
from saccade.engines.serve.sampling import choose

logit = st.integers(-40, 40).map(lambda n: n / 8)


def warped(logits, wish):
    """Probabilities by transformers' own pieces."""
    scores = TemperatureLogitsWarper(wish.temperature)(None, logits[None])
    return (scores if wish.top_p == 1 else TopPLogitsWarper(wish.top_p)(None, scores)).softmax(-1)[0]


eighths = st.integers(1, 8).map(lambda n: n / 8)
wishes = st.builds(Wish, temperature=eighths.map(lambda x: 2 * x), top_p=eighths)


@given(st.lists(logit, min_size=1, max_size=12, unique=True), wishes)
def test_the_share_of_draws_that_gives_a_token_is_its_probability(logits, wish):
    logits, many = torch.tensor(logits), 4000
    wanted = warped(logits, wish)
    draws = [(i + 0.5) / many for i in range(many)]  # evenly over [0, 1): no luck in it
    found = choose(logits.expand(many, -1), [wish] * many, draws).bincount(minlength=len(logits)) / many
    cumulated_places_off = 2 / many  # either border of a token's interval may fall between two draws
    assert (found - wanted).abs().max() <= cumulated_places_off + torch.finfo(torch.float32).eps * len(logits)


@given(st.data())
def test_every_row_chooses_for_itself(data):
    rows = data.draw(st.integers(1, 5))
    logits = torch.randn(rows, 9, generator=rng.generator("test", data.draw(st.integers(0, 99))))
    some = [data.draw(st.one_of(st.just(Wish(temperature=0.0)), wishes)) for _ in range(rows)]
    draws = [data.draw(st.floats(0, 1, exclude_max=True)) for _ in range(rows)]
    together = choose(logits, some, draws).tolist()
    assert together == [int(choose(logits[i : i + 1], some[i : i + 1], draws[i : i + 1])) for i in range(rows)]
    for token, row, wish in zip(together, logits, some):
        assert wish.temperature or token == int(row.argmax())


def test_top_p_of_nothing_still_leaves_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert choose(logits, [Wish(top_p=0.0)], [0.999]).tolist() == [1]


def test_logits_that_are_no_numbers_give_some_token():
    for value in (float("nan"), float("inf"), -float("inf")):
        found = choose(torch.full((1, 5), value), [Wish()], [0.5])
        assert 0 <= int(found) < 5
