"""Properties 6 and 8: the same tokens in other pieces, and caches that are reordered, cut back and picked from."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import strategies as st

from saccade.attach.compat import CACHE
from saccade.core.errors import CannotRun
from tests.conformance.cases import drawn, trials
from tests.conformance.runs import assert_same, read
from tests.methods.handmade import in_pieces


@pytest.mark.claims("chunks")
@drawn(4)
def test_06_chunks_and_steps_equal_one_pass(case, data):
    """A prompt in chunks equals the prompt at once; a prompt and steps after it equal one forward over everything."""
    trial = data.draw(trials(case))
    ids, n = trial.ids(), trial.prompt
    cuts = data.draw(st.lists(st.integers(1, n - 1), min_size=1, max_size=3, unique=True).map(sorted))
    with trial.attach():
        at_once = in_pieces(trial.model, ids, [n])
    assert_same(in_chunks(trial, cuts), at_once, trial, f"cut at {cuts}")
    if set(case.parts) != {"decode"}:  # of those the budget begins after the prompt: there is no one pass to equal
        with trial.attach(), torch.no_grad():
            one_pass = trial.model(ids, use_cache=True).logits
        assert_same(at_once, one_pass, trial, "steps")


def in_chunks(trial, cuts):
    """The prompt as one, but in several forwards; then the rest."""
    ids, n, out = trial.ids(), trial.prompt, []
    with trial.attach() as run, torch.no_grad():
        cache = run.new_cache()
        with run.prompt():
            for start, end in zip([0, *cuts], [*cuts, n]):
                out.append(trial.model(ids[:, start:end], **{CACHE: cache}).logits)
        out.append(trial.model(ids[:, n:], **{CACHE: cache}).logits)
    return torch.cat(out, 1)


@drawn()
def test_06_steps_after_the_prompt_equal_one_forward(case, data):
    """No card excuses this: `generate` takes steps, and the tasks read the answer in one forward."""
    trial = data.draw(trials(case))
    n, end = trial.prompt, trial.prompt + trial.rest
    stops = data.draw(st.just(range(n, end)) | st.lists(st.integers(n + 1, end - 1), unique=True).map(sorted))
    cuts = sorted({n, *stops})
    assert_same(read(trial, trial.ids(), cuts), read(trial, trial.ids()), trial, f"cut at {cuts}")


@drawn(2)
def test_06_generate_takes_those_steps(owner, data):
    """Greedy `generate` follows the logits of forwards."""
    trial = data.draw(trials(owner))
    prompt = trial.ids()[:, : trial.prompt]
    with trial.attach():
        words = trial.model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    logits = read(trial, words)
    at = range(trial.prompt - 1, words.shape[1] - 1)
    chosen = torch.stack([logits[0, i].index_fill(0, torch.tensor([2]), -torch.inf).argmax() for i in at])
    assert torch.equal(words[0, trial.prompt :], chosen)


@drawn()
def test_08_beams_selection_and_repetition_commute_with_the_cache(case, data):
    """Rows of the cache that go elsewhere give there what they would have given. No card excuses this: beams do it."""
    trial, rows = data.draw(trials(case)), 3
    ids, n = trial.ids(rows), trial.prompt
    order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
    how = data.draw(st.sampled_from(["reorder_cache", "batch_select_indices", "batch_repeat_interleave"]))
    order = torch.arange(rows).repeat_interleave(2) if how == "batch_repeat_interleave" else order
    with trial.attach(), torch.no_grad():
        cache = trial.model(ids[:, :n], use_cache=True)[CACHE]
        trial.model(ids[:, n : n + 1], **{CACHE: cache})
        getattr(cache, how)(2 if how == "batch_repeat_interleave" else order)
        moved = trial.model(ids[order, n + 1 :], **{CACHE: cache}).logits
        straight = in_pieces(trial.model, ids[order], [n, n + 1])[:, n + 1 :]
    assert_same(moved, straight, trial, f"{how} {order.tolist()}")


@pytest.mark.claims("cache-ops")
@drawn(4)
def test_08_tokens_taken_back_were_never_there(case, data):
    """Some tokens, a wrong guess, crop, other tokens: as if the guess had not been read."""
    trial = data.draw(trials(case))
    before = data.draw(st.integers(0, 9))
    ids, wrong = trial.ids(), trial.ids(name=5)[:, -data.draw(st.integers(1, 4)) :]
    known = torch.cat([ids[:, : trial.prompt], trial.ids(name=9)[:, :before]], 1)
    with trial.attach(), torch.no_grad():
        cache = trial.model(known[:, : trial.prompt], use_cache=True)[CACHE]
        for i in range(trial.prompt, known.shape[1]):
            trial.model(known[:, i : i + 1], **{CACHE: cache})
        with contextlib.suppress(CannotRun):  # refused where nothing is dropped after the prompt: no need to wait
            for layer in cache.layers:
                layer.activate_past_recording()
        trial.model(wrong, **{CACHE: cache})
        cache.crop(-wrong.shape[1])
        after = trial.model(ids[:, trial.prompt :], **{CACHE: cache}).logits
        straight = in_pieces(
            trial.model,
            torch.cat([known, ids[:, trial.prompt :]], 1),
            list(range(trial.prompt, known.shape[1] + 1)),
        )
    assert_same(after, straight[:, known.shape[1] :], trial, f"after {before} steps, {wrong.shape[1]} taken back")
