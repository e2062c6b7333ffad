"""Ordinary `generate`, in every way that it goes, under what is remembered and read: the same words in a batch as
alone, by beams, in chunks, in a conversation; drawn words by the logits of forwards; guesses, or a refusal in words."""

from __future__ import annotations

import functools

import pytest
import torch

from saccade import models
from saccade.attach import attach, caches
from saccade.attach.compat import CACHE
from saccade.core.errors import CannotRun
from tests.conformance.cases import Case, equipped
from tests.methods.handmade import in_pieces, tokens

PROMPT, SHORT, SAYS = 41, 30, 4
WINDOW = 8
WINDOWED = ("qwen3", "gemma2")  # every other layer slides, and stays the model's own
CORE = ("snapkv", "duo-attention", "double-sparsity")
TOGETHER = [("minference", "snapkv"), ("snapkv", "kivi"), ("minference", "snapkv", "kivi"), ("snapkv", "quest"),
            ("minference", "double-sparsity"), ("minference", "razor-attention")]  # fmt: skip
PLAIN = {"max_new_tokens": SAYS, "min_new_tokens": SAYS, "do_sample": False, "pad_token_id": 0}


@functools.cache
def some(family):
    """A tiny model in float64, but for gemma2, whose own layers mask in float32 what is float64's least number."""
    there = {"window": WINDOW, "layers": 4} if family in WINDOWED else {}
    return models.tiny(family, **there).to(torch.float32 if family == "gemma2" else torch.float64)


def made(names, model):
    """Methods in the sizes of a tiny model, equipped for it."""
    return [equipped(Case(name).method(), model) for name in names]


def budget_of(names):
    """Below all that every one of them takes."""
    each = [set(Case(name).budgets) for name in names if Case(name).budgets]
    return sorted(set.intersection(*each) - {0.05}, key=str)[0] if each else 1.0


def new(words, prompt):
    return words[:, prompt.shape[1] :]


def assert_it_generates(model, methods, budget):
    a, b = tokens(PROMPT, 2).split(1)
    b = b[:, PROMPT - SHORT :]
    both = torch.cat([a, torch.nn.functional.pad(b, (PROMPT - SHORT, 0))])
    mask = torch.ones_like(both)
    mask[1, : PROMPT - SHORT] = 0
    with attach(model, methods, budget=budget) as run:
        alone = [model.generate(x, **PLAIN) for x in (a, b)]
        together = model.generate(both, attention_mask=mask, **PLAIN)
        assert torch.equal(new(together, both), torch.cat([new(alone[0], a), new(alone[1], b)])), "a padded batch"
        beams = PLAIN | {"num_beams": 2}
        wanted = [new(model.generate(x, **beams), x) for x in (a, b)]
        assert torch.equal(new(model.generate(both, attention_mask=mask, **beams), both), torch.cat(wanted)), "beams"
        if not caches.why_not_in_pieces(run, run.new_cache()):
            chunked = model.generate(both, attention_mask=mask, **PLAIN, prefill_chunk_size=7)  # the first is padding
            assert torch.equal(chunked, together), "prompts in chunks"
        assert_a_conversation_goes_on(model, run, a)
        if model is not some("llama"):  # the rest is no matter of families
            return
        assert_drawn_by_the_logits(model, a)
        assert_guesses_change_nothing(model, run, a, alone[0])


def assert_drawn_by_the_logits(model, prompt):
    """What was drawn was drawn by what forwards give."""
    told = PLAIN | {"do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    drawn = model.generate(prompt, **told)
    logits = in_pieces(model, drawn.sequences[:, :-1], [PROMPT])
    torch.testing.assert_close(torch.stack(drawn.logits, 1).to(logits), logits[:, PROMPT - 1 :], check_dtype=False)


def assert_a_conversation_goes_on(model, run, prompt):
    """Two turns in one cache: the second is read behind the first, whose last word it begins with."""
    cache = run.new_cache()
    said = model.generate(prompt, **{CACHE: cache}, **PLAIN)
    asked = torch.cat([said, tokens(9)], 1)
    mask = torch.ones_like(asked)  # else a word that stands for padding would be taken for it
    turn = model.generate(asked, attention_mask=mask, **{CACHE: cache}, **PLAIN)
    steps = [PROMPT, *range(PROMPT + 1, said.shape[1]), *range(asked.shape[1], turn.shape[1])]
    logits = in_pieces(model, turn, steps)[0, asked.shape[1] - 1 : -1].index_fill(1, torch.tensor([2]), -torch.inf)
    assert torch.equal(turn[0, asked.shape[1] :], logits.argmax(-1)), "a conversation"


def assert_guesses_change_nothing(model, run, prompt, wanted):
    """Assisted decoding gives the same words, or says that it cannot."""
    try:
        assert torch.equal(model.generate(prompt, **PLAIN, prompt_lookup_num_tokens=3), wanted), "guesses"
    except CannotRun as refused:
        assert str(refused).startswith("assisted decoding with ") and "Use ordinary decoding" in str(refused)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_generates_under_the_core(family):
    model = some(family)
    for name in CORE:
        assert_it_generates(model, made([name], model), 0.5)


def test_it_generates(keeper):
    model = some("llama")
    assert_it_generates(model, made([keeper.name], model), budget_of([keeper.name]))


@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
def test_together_they_generate(names):
    model = some("llama")
    assert_it_generates(model, made(names, model), budget_of(names))
