"""What a probe must be beyond the fifteen properties: it reads only, and what it saw depends on the text alone."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import models
from saccade.attach import attach, explain
from saccade.attach.compat import CACHE
from saccade.core.errors import CannotRun
from saccade.methods.cache.streaming import Streaming
from tests.conformance.cases import FEW, equipped, tiny, trials
from tests.conformance.runs import Padded, kernel
from tests.methods.handmade import in_pieces, tokens

WINDOWED = {"qwen3": 5, "gemma2": 5}  # every other layer has a window, and is the model's own affair


@functools.cache
def some(family):
    """A tiny model of a family, in its own precision and by its own attention."""
    return models.tiny(family, window=WINDOWED.get(family))


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_01_under_a_probe_every_bit_is_the_models_own(probe, family, own):
    """Logits and cache, in pieces, with padding, and what is generated, greedily and by beams."""
    model = some(family)
    if own == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has no such attention")
    ids, mask = tokens(30, 2), torch.ones(2, 30, dtype=torch.long)
    mask[1, :4] = 0

    def everything():
        with torch.no_grad():
            out = model(ids, attention_mask=mask, use_cache=True)
            beams = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3)
            words = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            cache = [x for layer in out[CACHE].layers for x in (layer.keys, layer.values)]
            return [in_pieces(model, ids, [20, 21]), out.logits, beams, words, *cache]

    with kernel(model, own):
        before = everything()
        with attach(model, probe.method()):
            explain(model, probe.method())  # another look at the model meanwhile changes nothing either
            under = everything()
        after = everything()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(before, under, after, strict=True))


def test_13_a_probe_looks_on_alone_and_at_what_it_can_leave_as_it_is(probe):
    model = tiny(4, 2, 16)
    with pytest.raises(CannotRun, match=f"{probe.name} looks on at the model's own attention, not at streaming"):
        attach(model, [equipped(probe.method(), model), Streaming()], budget=0.5)
    refused = pytest.raises(CannotRun, match="by 'flex_attention'; a probe looks on at sdpa or eager")
    with kernel(model, "flex_attention"), refused:
        attach(model, equipped(probe.method(), model))


def test_13_tokens_and_an_empty_cache_are_needed(probe):
    model, ids = copy.deepcopy(tiny(4, 2, 16)), tokens(9)
    filled = model(ids, use_cache=True)[CACHE]
    with attach(model, probe.method()) as run:
        assert run.result() == []
        model(ids, use_cache=False)
        assert [one.prompt for one in run.notes()] == [9] and run.record.kept_fraction == 1.0
        with pytest.raises(CannotRun, match="it was given no input_ids to tell tokens by"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(CannotRun, match="it was filled before attaching"):
            model(ids, **{CACHE: filled})
        mine = model(ids, use_cache=True)[CACHE]
    model(ids, **{CACHE: mine})  # the model's own cache goes on without the probe
    with attach(model, probe.method()), pytest.raises(CannotRun, match="it was filled before attaching"):
        model(ids, **{CACHE: mine})
    with attach(model, Streaming(), budget=0.5), pytest.raises(CannotRun, match="it was filled before attaching"):
        model(ids, **{CACHE: mine})


def test_14_no_notes_before_the_prompt_of_assisted_decoding(probe):
    model = tiny(4, 2, 16)
    refused = pytest.raises(CannotRun, match="read together with the prompt, whose end is not to be told")
    with attach(model, probe.method()) as run, refused:
        run.new_cache().activate_past_recording()


def notes(run):
    """What was noted of each sequence, as plain values."""
    return [(n.tokens.tolist(), n.prompt, [{k: x.tolist() for k, x in layer.items()} for layer in n.layers])
            for n in run.notes()]  # fmt: skip


def seen(trial, ids, cuts):
    """The table and the notes of a text that was fed in pieces."""
    with trial.attach() as run:
        in_pieces(trial.model, ids, cuts)
    return run.result(), notes(run)


@given(data=st.data())
@FEW
def test_05_06_what_is_seen_depends_on_no_neighbour_and_on_no_piece(probe, data):
    trial = data.draw(trials(probe))
    rows, n = trial.ids(rows=3), trial.prompt
    together = seen(trial, rows, [n])[1]
    assert together == [seen(trial, row[None], [n])[1][0] for row in rows]
    assert seen(trial, rows, range(n, n + trial.rest)) == seen(trial, rows, [n])
    with trial.attach() as run, torch.no_grad():
        cache = run.new_cache()
        with run.prompt():
            for part in (rows[:, : n // 2], rows[:, n // 2 : n]):
                trial.model(part, **{CACHE: cache})
        trial.model(rows[:, n:], **{CACHE: cache})
    assert run.result() == seen(trial, rows, [n])[0]


@pytest.mark.parametrize("side", ["left", "right"])
@given(data=st.data())
@FEW
def test_04_padding_is_not_seen(probe, side, data):
    trial = data.draw(trials(probe))
    a, b, c = trial.ids(rows=3)
    n, short = trial.prompt, data.draw(st.integers(1, trial.prompt))
    prompts, more = Padded.of([a[:n], b[:short], c[:0]], side), torch.stack([a[n:], b[n:], c[n:]])
    whole = torch.cat([prompts.real, torch.ones_like(more, dtype=torch.bool)], 1).long()
    where = prompts.real.sum(-1, keepdim=True) + torch.arange(more.shape[1])
    with trial.attach() as run, torch.no_grad():
        cache = run.new_cache()
        trial.model(prompts.ids, attention_mask=prompts.real.long(), position_ids=prompts.position, **{CACHE: cache})
        trial.model(more, attention_mask=whole, position_ids=where, **{CACHE: cache})
    first, second, empty = notes(run)
    assert first == seen(trial, a[None], [n])[1][0]
    assert second == seen(trial, torch.cat([b[:short], b[n:]])[None], [short])[1][0]
    assert (empty[0], empty[1]) == (c[n:].tolist(), 0)


@given(data=st.data())
@FEW
def test_08_notes_follow_their_sequences(probe, data):
    """Reordered, repeated, picked and cut back, a cache's notes are those of the texts that are left in it."""
    trial = data.draw(trials(probe))
    rows, n = trial.ids(rows=3), trial.prompt
    order = data.draw(st.permutations([0, 1, 2]))
    with trial.attach() as run, torch.no_grad():
        cache = trial.model(rows[:, :n], use_cache=True)[CACHE]
        trial.model(rows[:, n:].flip(1), **{CACHE: cache})
        cache.crop(n - cache.get_seq_length())
        cache.reorder_cache(torch.tensor(order))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2, 4]))
        trial.model(rows[order][:, n:], **{CACHE: cache})
    assert notes(run) == seen(trial, rows[order], [n])[1]


def test_08_a_copy_of_a_cache_has_its_notes_and_not_the_model(probe):
    model, ids = tiny(4, 2, 16), tokens(20)
    with attach(model, probe.method()) as run, torch.no_grad():
        cache = model(ids[:, :12], use_cache=True)[CACHE]
        twin = copy.deepcopy(cache)
        assert all(layer.run is run for layer in twin.layers)
        model(ids[:, 12:], **{CACHE: cache})
        first = notes(run)
        assert {layer.notes["real"].shape[1] for layer in twin.layers} == {12}
        again = model(ids[:, 12:], **{CACHE: twin})[CACHE]
    assert all(torch.equal(a.notes[n], b.notes[n]) for a, b in zip(again.layers, cache.layers) for n in a.notes)
    assert len(first[0][0]) == 20
