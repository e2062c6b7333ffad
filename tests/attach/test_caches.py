"""Joined caches, rows that leave, and the beginning of a prompt: the same tokens as each sequence by itself."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saccade
from saccade import models
from saccade.attach import caches, compat
from saccade.attach.compat import CACHE
from saccade.measure.contestants import parse

WINDOW = 8
MODELS = {
    "llama": models.tiny("llama"),
    "gpt-neox": models.tiny("gpt-neox"),
    "mistral": models.tiny("mistral", window=WINDOW),
    "gemma3": models.tiny("gemma3", window=WINDOW),
}
CASES = [(family, None) for family in MODELS] + [
    ("llama", "snapkv"), ("llama", "streaming"), ("llama", "random:part=decode"), ("gemma3", "knorm"),
    ("llama", "retrieval-attention:sink_tokens=1,window_tokens=3"), ("llama", "kivi:group_tokens=4,residual_tokens=4"),
]  # fmt: skip


def attached(model, method):
    chosen = parse(method or "full")
    packs = any("pack" in m.parts for m in chosen.methods)
    return chosen.working(model, saccade.Budget.of(1.0 if packs else 0.5), 0)


def new_cache(model, run):
    return run.new_cache() if run else compat.new_cache(model)


@torch.no_grad()
def read(model, ids, cache, known=0):
    places = torch.arange(known, len(ids))[None]
    mask = torch.ones(1, len(ids), dtype=torch.long)
    return model(torch.tensor([ids[known:]]), attention_mask=mask, position_ids=places, **{CACHE: cache}).logits[0, -1]


def alone(model, run, ids, steps):
    """Tokens that follow, one sequence at a time."""
    cache, ids = new_cache(model, run), list(ids)
    token = int(read(model, ids, cache).argmax())
    for _ in range(steps):
        ids.append(token)
        token = int(read(model, ids, cache, len(ids) - 1).argmax())
    return [*ids, token]


@torch.no_grad()
def together(model, run, prompts, steps):
    """The same in one cache, whose rows leave when they are done."""
    cache, *others = [new_cache(model, run) for _ in prompts]
    told = [[*ids, int(read(model, ids, c).argmax())] for ids, c in zip(prompts, (cache, *others))]
    caches.take_in(cache, others)
    slots = max(map(len, prompts))
    mask = torch.tensor([[0] * (slots - len(ids)) + [1] * len(ids) for ids in prompts])
    left = list(range(len(prompts)))
    for step in range(max(steps)):
        stay = [i for i, row in enumerate(left) if steps[row] > step]
        if len(stay) < len(left):
            left, mask = [left[i] for i in stay], mask[stay]
            padding = int(mask.argmax(-1).min())
            mask = mask[:, padding:]
            caches.keep_rows(cache, stay, padding)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        last = torch.tensor([[told[row][-1]] for row in left])
        places = torch.tensor([[len(told[row]) - 1] for row in left])
        logits = model(last, attention_mask=mask, position_ids=places, **{CACHE: cache}).logits[:, -1]
        for row, token in zip(left, logits.argmax(-1).tolist()):
            told[row].append(token)
    return told


@settings(max_examples=6)
@given(st.data())
@pytest.mark.parametrize(("family", "method"), CASES)
def test_sequences_in_one_cache_go_on_as_alone(family, method, data):
    model, count = MODELS[family], data.draw(st.integers(1, 4))
    prompts = [data.draw(st.lists(st.integers(3, 120), min_size=1, max_size=3 * WINDOW)) for _ in range(count)]
    steps = [data.draw(st.integers(0, WINDOW)) for _ in prompts]
    with attached(model, method) as run:
        wanted = [alone(model, run, ids, n) for ids, n in zip(prompts, steps)]
        assert together(model, run, prompts, steps) == wanted


@settings(max_examples=10)
@given(st.data())
@pytest.mark.parametrize("method", [None, "snapkv:window_tokens=2", "random"])
def test_a_prompt_goes_on_from_the_beginning_of_another(method, data):
    model = MODELS["llama"]
    ids = data.draw(st.lists(st.integers(3, 120), min_size=4, max_size=30))
    shared = data.draw(st.integers(1, len(ids) - 2))
    with attached(model, method) as run:
        first, prompt = new_cache(model, run), run.prompt if run else contextlib.nullcontext
        with prompt():
            read(model, ids, first)
            kept = caches.beginning(first, len(ids))
        other = ids[:shared] + data.draw(st.lists(st.integers(3, 120), min_size=2, max_size=9))
        cache = caches.beginning(kept, shared)
        caches.resume(cache)
        with prompt():
            token = int(read(model, other, cache, shared).argmax())
        after = [token, int(read(model, [*other, token], cache, len(other)).argmax())]
        assert [*other, *after] == alone(model, run, other, 1)
        assert alone(model, run, ids, 1)[:-1] == [*ids, int(read(model, ids, new_cache(model, run)).argmax())]


def test_what_joined_is_empty_afterwards():
    model = MODELS["llama"]
    a, b = compat.new_cache(model), compat.new_cache(model)
    read(model, [3, 4, 5], a), read(model, [6], b)
    caches.take_in(a, [b])
    assert (a.get_seq_length(), b.get_seq_length()) == (3, 0)


def test_what_cannot_be_joined_or_continued_is_said():
    model = MODELS["gemma3"]
    cache = compat.new_cache(model)
    read(model, [3, 4], cache)
    assert caches.why_not_joined(None, cache) == []
    assert caches.why_not_continued(None, cache) == ["the tokens in a DynamicSlidingWindowLayer cannot be taken back"]
    cache.layers[0].__class__ = type("Odd", (type(cache.layers[1]),), {})
    assert caches.why_not_joined(None, cache) == ["layer 0 keeps its tokens in a Odd"]
    with attached(MODELS["llama"], "minference") as run:
        cache = run.new_cache()
        found = caches.why_not_continued(run, cache)
    assert len(found) == 1 and found[0].startswith("minference reads a prompt as a whole: lines are estimated from")


def test_a_method_that_reads_tokens_again_is_not_joined():
    model = models.tiny("llama", layers=6)
    with attached(model, "tidaldecode:dense_layers=1,reselect_layer=none,correct_tokens=4") as run:
        said = ["tidaldecode reads tokens again, each sequence at a time of its own"]
        assert caches.why_not_joined(run, run.new_cache()) == said


def test_the_queries_that_a_method_looks_at_are_read_anew():
    with attached(MODELS["llama"], "snapkv:window_tokens=5") as run:
        assert caches.observed_tokens(run) == 5
    assert caches.observed_tokens(None) == 1
