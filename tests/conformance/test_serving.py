"""Served together, with others that come and go: a request gets the tokens that `generate` gives it alone."""

from __future__ import annotations

from tests.conformance.cases import equipped, tiny
from tests.engines.serve.helpers import Client, alone, greedy, ids, service

LENGTHS, STARTS, COUNTS = (60, 21, 1, 70, 45), (0, 0, 5, 0, 9), (9, 7, 5, 1, 8)  # three of the prompts begin alike


def test_served_together_it_is_generate_alone(plain):
    model = tiny(4, 2, 16)
    method, budget = equipped(plain.method(), model), next(iter(plain.budgets[1:]), 1.0)
    prompts = [ids(length, start) for length, start in zip(LENGTHS, STARTS)]
    with service(method, model, budget, batch=3, prefill_chunk=16) as s:
        clients = [Client(s, prompt, greedy(count)) for prompt, count in zip(prompts, COUNTS)]
        found, reuse = [c.tokens() for c in clients], s.health()["prefixes"]
    assert found == alone(method, prompts, COUNTS, model, budget)
    assert bool(reuse["hits"]) != bool(reuse["why_not"])
