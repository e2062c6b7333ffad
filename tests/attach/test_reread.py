"""Tokens that are read again: padded batches, beams, tokens taken back, several caches, bytes, what is refused."""

from __future__ import annotations

import pytest
import torch

from saccade import models
from saccade.attach import attach, reread
from saccade.attach.compat import CACHE
from saccade.core.errors import CannotRun
from saccade.methods.decode.tidaldecode import TidalDecode
from tests.methods.handmade import in_pieces, tiny, tokens

PROMPT, END, EVERY = 24, 44, 4
BUDGET = 0.7


def reader(every=EVERY):
    return TidalDecode(dense_layers=0, reselect_layer="none", correct_tokens=every)


def steps(model, cache, ids, **options):
    """Logits of these tokens, one forward for each."""
    with torch.no_grad():
        return torch.cat([model(x, **{CACHE: cache}, **options).logits for x in ids.split(1, dim=1)], 1)


def read(model, ids, run):
    cache = run.new_cache()
    with torch.no_grad():
        model(ids[:, :PROMPT], **{CACHE: cache})
    return cache, steps(model, cache, ids[:, PROMPT:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate_pads_and_reorders(options):
    """Rows of a batch give what each gives alone, and something else than without reading again."""
    model, ids = tiny(layers=3), tokens(20, 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    told = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, **options}
    with attach(model, reader(), budget=BUDGET):
        together = model.generate(ids, attention_mask=mask, **told)
        for row, start in enumerate((0, 7)):
            alone = model.generate(ids[row : row + 1, start:], **told)
            assert torch.equal(together[row, start:], alone[0])


def test_it_changes_what_comes_later():
    model, ids = tiny(layers=3), tokens(END)
    with attach(model, reader(), budget=BUDGET) as run:
        _, found = read(model, ids, run)
    with attach(model, reader(0), budget=BUDGET) as run:
        _, plain = read(model, ids, run)
    same = [torch.allclose(found[:, i], plain[:, i]) for i in range(END - PROMPT)]
    assert all(same[:EVERY]) and not any(same[EVERY:])


def test_pieces_change_nothing(monkeypatch):
    model, ids = tiny(layers=3), tokens(END)
    with attach(model, reader(7), budget=BUDGET) as run:
        _, at_once = read(model, ids, run)
        monkeypatch.setattr(reread, "CHUNK_TOKENS", 3)
        _, in_chunks = read(model, ids, run)
    torch.testing.assert_close(in_chunks, at_once)


def test_caches_of_one_run_keep_apart():
    model, ids = tiny(layers=3), tokens(END, 2)
    with attach(model, reader(), budget=BUDGET) as run, torch.no_grad():
        expected = [read(model, ids[i : i + 1], run)[1] for i in range(2)]
        caches = [run.new_cache() for _ in range(2)]
        for cache, row in zip(caches, ids):
            model(row[None, :PROMPT], **{CACHE: cache})
        for i in range(PROMPT, END):
            for cache, row, logits in zip(caches, ids, expected):
                found = model(row[None, i : i + 1], **{CACHE: cache}).logits
                torch.testing.assert_close(found[:, 0], logits[:, i - PROMPT])


def test_taken_back_tokens_are_not_read_again():
    model, ids, wrong = tiny(layers=3), tokens(END), tokens(END + 9)[:, -2:]
    with attach(model, reader(), budget=BUDGET) as run, torch.no_grad():
        _, expected = read(model, ids, run)
        cache = run.new_cache()
        model(ids[:, :PROMPT], **{CACHE: cache})
        steps(model, cache, torch.cat([ids[:, PROMPT : PROMPT + 2], wrong], 1))
        cache.crop(-2)
        after = steps(model, cache, ids[:, PROMPT + 2 :])
    torch.testing.assert_close(after, expected[:, 2:])


def test_what_is_noted_is_counted():
    model, ids, noted = tiny(layers=3), tokens(END), []
    with attach(model, reader(EVERY), budget=BUDGET) as run, torch.no_grad():
        cache = run.new_cache()
        model(ids[:, :PROMPT], **{CACHE: cache})
        for i in range(PROMPT, PROMPT + EVERY + 2):
            model(ids[:, i : i + 1], **{CACHE: cache})
            whole = run.record.bytes_held
            kept = [(layer, layer.since) for layer in cache.layers]
            for layer, _ in kept:
                layer.since = {}
            noted.append(whole - sum(layer.bytes_held() for layer in cache.layers))
            for layer, since in kept:
                layer.since = since
    assert noted == [2 * 8 * (i % EVERY + 1) for i in range(EVERY + 2)], "ids and positions of eight bytes"


def test_a_prompt_in_chunks_is_no_reason_to_read_again():
    model, ids = tiny(layers=3), tokens(PROMPT + 3)
    with attach(model, reader(2), budget=BUDGET) as run:
        cache = run.new_cache()
        with run.prompt():
            steps(model, cache, ids[:, :PROMPT])
        found = steps(model, cache, ids[:, PROMPT:])
        expected = in_pieces(model, ids, [PROMPT, PROMPT + 1, PROMPT + 2])[:, PROMPT:]
    torch.testing.assert_close(found, expected)


def test_what_cannot_be_read_again_says_why():
    model, ids = tiny(layers=3), tokens(PROMPT + 2, 2)
    said = r"read tokens again every 4 under tidaldecode: {}. Leave that option away"
    with attach(model, reader(), budget=BUDGET) as run, torch.no_grad():
        cache = run.new_cache()
        model(ids[:, :PROMPT], **{CACHE: cache})
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        with pytest.raises(CannotRun, match=said.format("there is padding among the tokens after the prompt")):
            model(ids[:, PROMPT:], attention_mask=mask, **{CACHE: cache})
        places = torch.zeros(3, 2, 2, dtype=torch.long)
        with pytest.raises(CannotRun, match=said.format(r"position_ids \(3, 2, 2\) are not \[batch, tokens\]")):
            model(ids[:, PROMPT:], position_ids=places, **{CACHE: cache})
    windows = models.tiny("gemma3", layers=4, window=8)
    said = said.format("some layers keep a window only, which cannot take tokens back")
    with attach(windows, reader(), budget=1.0), torch.no_grad(), pytest.raises(CannotRun, match=said):
        windows(ids, use_cache=True)
