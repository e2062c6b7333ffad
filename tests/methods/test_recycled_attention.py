"""Recycled Attention against its pseudo-code as plain loops, and a dense pass under the keys that those read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, CannotRun
from saccade.core.selection import dense
from saccade.core.site import Seen
from saccade.methods.decode.recycled_attention import RecycledAttention
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

SHARES = st.sampled_from([0.3, 0.5, 0.75, 0.95])
METHODS = st.builds(
    RecycledAttention,
    every_tokens=st.integers(4, 9),
    schedule=st.sampled_from(["stride", "dynamic"]),
    check_tokens=st.integers(1, 5),
    similarity=st.sampled_from([-2.0, 0.0, 0.1, 2.0]),
    group=st.sampled_from(["max", "mean"]),
    prompt_tokens=st.integers(1, 4),
)


# --- the pseudo-code --------------------------------------------------------------------------------------------------


def allowed(stored, steps, share):
    """What so many steps may read together, at least."""
    total = 0
    for i in range(1, steps + 1):
        total += stored + i
    return math.floor(share * total) - steps


def cheap_reads(method, stored, share):
    """K: what S - 1 cheap steps can share, the full one at their end paid."""
    steps = method.every_tokens
    left = allowed(stored, steps, share) - (stored + steps)
    return max(1, min(left // (steps - 1), Budget(share).tokens(stored + 1)))


def ranking(method, q, k, rows, scale):
    """Per key/value head: keys before the last row's end, by the probability that its query heads give them."""
    out, group = [], len(q) // len(k)
    for head, keys in enumerate(k):
        votes = []
        for query in q[head * group : (head + 1) * group]:
            vote = torch.zeros(rows[-1] + 1, dtype=torch.float64)
            for row in rows:
                vote[: row + 1] += (query[row] @ keys[: row + 1].T * scale).softmax(-1)
            votes.append(vote)
        worth = [max(v) if method.group == "max" else sum(v) for v in zip(*[v.tolist() for v in votes])]
        out.append(sorted(range(len(worth)), key=lambda j: -worth[j]))
    return out


def oracle(method, q, k, prompt, share, scale=8**-0.5):
    """Of one sequence, q [h n d] and k [g n d]: the pairs of all rows [h n n] and the full rows after the prompt."""
    q, k = q.double(), k.double()
    (heads, n, _), full = q.shape, []
    mask = torch.ones(n, n, dtype=torch.bool).tril().repeat(heads, 1, 1)
    at, saved, asked = prompt, 0, q[:, prompt - 1]
    ranked = ranking(method, q, k, range(max(0, prompt - method.prompt_tokens), prompt), scale)
    for row in range(prompt, n):
        steps, reads = row + 1 - at, cheap_reads(method, at, share)
        due = steps >= method.every_tokens
        if method.schedule == "dynamic":
            cosine = torch.nn.functional.cosine_similarity(q[:, row], asked, dim=-1).mean()
            due = steps % method.check_tokens == 0 and cosine < method.similarity
        rest = saved + allowed(at, steps, share) - (steps - 1) * reads - (row + 1)
        if due and rest >= 0:
            full.append(row)
            at, saved, asked, ranked = row + 1, rest, q[:, row], ranking(method, q, k, [row], scale)
            continue
        for head in range(heads):
            newest = min(steps, reads)
            mask[head, row] = False
            mask[head, row, row + 1 - newest : row + 1] = True
            mask[head, row, ranked[head * len(k) // heads][: reads - newest]] = True
    return mask, full


def read(method, q, k, prompt, share, cuts=()):
    """The pairs that the method chooses after the prompt, asked piece by piece: [b h rest n]."""
    n, out = k.shape[2], []
    start = site(share, queries=0, keys=prompt)
    positions, before = torch.arange(n, dtype=torch.int32).expand(*k.shape[:2], n), k[:, :, :prompt]
    last = q[:, :, max(0, prompt - method.prompt_tokens) : prompt]
    method.begin(Seen(before, before, positions[..., :prompt], last), start)
    for a, z in zip([prompt, *cuts], [*cuts, n]):
        here = site(share, queries=z - a, keys=z, stage="decode", state=start.state)
        chosen = method.select(q[:, :, a:z], {"keys": k[:, :, :z], "positions": positions[..., :z]}, here)
        out.append(torch.nn.functional.pad(chosen.mask().expand(len(q), 4, -1, -1), (0, n - z)))
    return torch.cat(out, 2)


@given(METHODS, st.integers(1, 40), st.integers(1, 30), SHARES, st.data())
@settings(max_examples=60, deadline=None)
def test_the_choice_is_that_of_the_pseudo_code_however_it_is_cut(method, prompt, rest, share, data):
    n = prompt + rest
    q, k = noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k")
    cuts = data.draw(st.lists(st.integers(prompt, n), unique=True, max_size=4).map(sorted))
    cuts = [c for c in cuts if prompt < c < n]
    mask, _ = oracle(method, q[0], k[0], prompt, share)
    assert torch.equal(read(method, q, k, prompt, share, cuts)[0], mask[:, prompt:])


@given(METHODS, st.integers(1, 60), st.integers(1, 40), SHARES)
@settings(max_examples=60, deadline=None)
def test_up_to_every_token_the_budget_pays_for_all_reads(method, prompt, rest, share):
    n = prompt + rest
    mask = read(method, noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k"), prompt, share)
    reads = mask.sum(-1)[0].cumsum(-1)
    assert (reads <= torch.tensor([Budget(share).tokens(t) for t in range(prompt + 1, n + 1)]).cumsum(0)).all()
    assert mask.any(-1).all()


def test_a_full_step_comes_at_every_stride_and_the_others_read_as_many_keys():
    method, n, prompt = RecycledAttention(every_tokens=6), 80, 50
    q, k = noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k")
    counts = read(method, q, k, prompt, 0.5)[0, 0].sum(-1).tolist()
    full = [i for i, count in enumerate(counts) if count == prompt + i + 1]
    assert full == [5, 11, 17, 23, 29]
    for first in (0, *[i + 1 for i in full[:-1]]):
        assert set(counts[first : first + 5]) == {cheap_reads(method, prompt + first, 0.5)}


@given(st.integers(2, 9), st.integers(1, 40), SHARES)
@settings(max_examples=30, deadline=None)
def test_a_dynamic_schedule_that_always_or_never_moves(every, prompt, share):
    """A similarity above 1 is a stride of the checks; one below -1 never takes a full step."""
    n = prompt + 30
    q, k = noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k")
    if share * every > 1:
        always = RecycledAttention(schedule="dynamic", similarity=2.0, check_tokens=every, every_tokens=every)
        _, full = oracle(RecycledAttention(every_tokens=every), q[0], k[0], prompt, share)
        stride = read(RecycledAttention(every_tokens=every), q, k, prompt, share)
        if all(b - a == every for a, b in zip([prompt - 1, *full], full)):  # else some had to wait for the budget
            assert torch.equal(read(always, q, k, prompt, share), stride)
    never = RecycledAttention(schedule="dynamic", similarity=-2.0, check_tokens=every, every_tokens=50)
    assert (read(never, q, k, prompt, share).sum(-1) <= cheap_reads(never, prompt, share)).all()


@pytest.mark.parametrize("schedule", ["stride", "dynamic"])
def test_rows_of_a_batch_keep_their_own_schedule(schedule):
    """One row's queries never turn, the other's do: only there the choice is renewed."""
    method = RecycledAttention(every_tokens=4, schedule=schedule, check_tokens=3, similarity=0.9)
    q, k = noise(2, 4, 70, 8, name="q"), noise(2, 2, 70, 8, name="k")
    q[0] = q[0, :, :1]
    both = read(method, q, k, 40, 0.6, [44, 61])
    full = both.sum(-1)[:, 0] == torch.arange(41, 71)
    assert full[1].any() and bool(full[0].any()) == (schedule == "stride")
    for i in range(2):
        assert torch.equal(both[i : i + 1], read(method, q[i : i + 1], k[i : i + 1], 40, 0.6))


def test_a_model_reads_a_batch_whose_rows_take_full_steps_at_different_times_as_each_alone():
    """The first row says one word over and over, and its queries hardly turn."""
    model, rows = tiny(), tokens(70, 2)
    rows[0] = rows[0, :1]
    method = RecycledAttention(every_tokens=4, schedule="dynamic", check_tokens=3, similarity=0.0)
    with attach(model, method, budget=0.6), torch.no_grad():
        cache = model(rows[:, :40], use_cache=True)[CACHE]
        both = model(rows[:, 40:], **{CACHE: cache}).logits
        plans = cache.layers[0].states["recycled-attention"].gather([0, 1])["plan"]
        one, other = plans[:, 0].tolist()
        assert one[0] == 40 < other[0], "seen at the last choice"
        for i in range(2):
            torch.testing.assert_close(both[i : i + 1], in_pieces(model, rows[i : i + 1], [40])[:, 40:])


@pytest.mark.parametrize("schedule", ["stride", "dynamic"])
@pytest.mark.parametrize("group", ["max", "mean"])
def test_decoding_reads_those_keys_and_nothing_else(schedule, group):
    model, ids, prompt = tiny(), tokens(60), 30
    method = RecycledAttention(every_tokens=7, schedule=schedule, check_tokens=2, similarity=0.5, group=group)
    with attach(model, method, budget=0.6) as run:
        found = in_pieces(model, ids, [prompt, prompt + 1, prompt + 20])
        assert run.record.density("decode") <= 0.6

    def mask(layer, q, k):
        return oracle(method, q[0], k[0], prompt, 0.6, model.config.head_dim**-0.5)[0][None]

    torch.testing.assert_close(found, under_mask(model, ids, mask))


@given(st.integers(1, 12), st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_full_budget_is_dense(every, rest):
    method, n = RecycledAttention(every_tokens=every), 20 + rest
    here = site(1.0, queries=rest, keys=n, stage="decode")
    assert torch.equal(method.select(noise(1, 4, rest, 8), {}, here).mask(), dense(rest, n).mask())
    model, ids = tiny(), tokens(n)
    with attach(model, method, budget=1.0):
        found = in_pieces(model, ids, [20])
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits)


@given(st.sets(st.integers(0, 38), min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)
def test_keys_that_an_eviction_dropped_are_not_read(dropped):
    """Chosen keys are remembered by their positions, so that what is stored may change in between."""
    method, n, prompt = RecycledAttention(every_tokens=9), 44, 40
    q, k = noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k")
    start = site(0.5, queries=0, keys=prompt)
    everything = torch.arange(n, dtype=torch.int32).expand(1, 2, n)
    before, last = k[:, :, :prompt], q[:, :, prompt - 1 : prompt]
    method.begin(Seen(before, before, everything[..., :prompt], last), start)
    there = torch.tensor([j for j in range(n) if j not in dropped])

    def positions(keys):
        here = site(0.5, queries=4, keys=len(keys), seen=n, stage="decode", state=dict(start.state))
        stored = {"keys": k[:, :, keys], "positions": everything[..., keys].contiguous()}
        mask = method.select(q[:, :, prompt:], stored, here).mask()
        return [{int(keys[j]) for j in row.nonzero()[:, 0]} for row in mask[0, 0]]

    for left, before in zip(positions(there), positions(torch.arange(n))):
        assert left == before - dropped


# --- tokens taken back ------------------------------------------------------------------------------------------------


def after_crop(steps, crop, more=6, every=8):
    """Logits of new tokens after a prompt of 40, `steps` single ones and the last `crop` taken back; and straight."""
    model, ids, other = tiny(), tokens(40 + steps), tokens(40 + more + 9)[:, -more:]
    with attach(model, RecycledAttention(every_tokens=every), budget=0.5), torch.no_grad():
        cache = model(ids[:, :40], use_cache=True)[CACHE]
        for i in range(40, 40 + steps):
            model(ids[:, i : i + 1], **{CACHE: cache})
        cache.crop(-crop)
        found = model(other, **{CACHE: cache}).logits
        kept = torch.cat([ids[:, : 40 + steps - crop], other], 1)
        return found, in_pieces(model, kept, [40])[:, -more:]


@pytest.mark.parametrize(("steps", "crop"), [(5, 3), (9, 2), (20, 5), (26, 9), (20, 20), (30, 30), (26, 3), (24, 8)])
def test_the_choice_in_use_before_tokens_were_taken_back_is_there_again(steps, crop):
    """Full steps are the 8th, 16th and 24th."""
    torch.testing.assert_close(*after_crop(steps, crop))


@pytest.mark.parametrize(("steps", "crop", "past", "made"), [(26, 15, 51, "40 and 56 and 64"), (3, 8, 35, "40")])
def test_a_choice_that_was_forgotten_is_said(steps, crop, past, made):
    text = (
        rf"from token {past}, up to which tokens were taken back: only the choices made at tokens {made} are"
        r" remembered, not the one in use there\. Take back fewer tokens, or all that came after the prompt\."
    )
    with pytest.raises(CannotRun, match=text):
        after_crop(steps, crop)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_run_says_why():
    for name in ("every_tokens", "check_tokens", "prompt_tokens"):
        with pytest.raises(BadOption, match=rf"recycled-attention\.{name}=0: it takes at least 1\. Leave it away"):
            RecycledAttention(**{name: 0})
    with pytest.raises(BadOption, match=r"similarity=nan: it is no number\. Give one from -1 to 1\."):
        RecycledAttention(similarity=math.nan)
    with pytest.raises(CannotRun, match=r"at every_tokens=4 alone use up budget=0\.25; change one of the two"):
        attach(tiny(), RecycledAttention(every_tokens=4), budget=0.25)
    with pytest.raises(CannotRun, match=r"read all keys, however many; budget=64tok cannot pay for that: give a fract"):
        attach(tiny(), "recycled-attention", budget="64tok")
    for fits in (0.26, 1.0):
        here = site(fits, queries=1, keys=9)
        assert RecycledAttention(every_tokens=4).check(here) == []
