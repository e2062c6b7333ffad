"""RazorAttention under scores made by hand, against loops over what each query of each head still has."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.attach import attach, fingerprint
from saccade.attach.calibration import Subject
from saccade.attach.compat import CACHE
from saccade.attach.listening import listening
from saccade.attach.probe import probe
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.paths import SHIPPED
from saccade.core.selection import causal_mask
from saccade.methods.cache.razor_attention import RazorAttention, looking_back
from tests.conformance.runs import read_padded
from tests.helpers import exact_attention
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens

MODEL, N, PROMPT = tiny(), 64, 48
SINKS, WINDOW, FOLD = 3, 4, 5
INDUCTION, ECHO = torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.0, 0.2], [0.1, 0.0]])
# budget -> whole heads (the best by induction, the best by echo) that it pays for at 48 tokens, keys of each other head
PAID = {"8tok": (set(), 8), "20tok": ({(0, 0)}, 10), 0.75: ({(0, 0), (0, 1)}, 24), "40tok": ({(0, 0), (0, 1)}, 32)}
FORMS = [(c, p) for c in ("count", "one", "none") for p in ("append", "roll")]
sizes = st.integers(0, 9)


def scores(induction=INDUCTION, echo=ECHO):
    return Artefact("razor-attention", {"induction": induction, "echo": echo}, "tiny", fingerprint(MODEL))


def razor(**changes):
    given_ = {"sink_tokens": SINKS, "window_tokens": WINDOW, "fold_tokens": FOLD, "artefact": scores()}
    return RazorAttention(**{**given_, **changes})


# --- the oracle -------------------------------------------------------------------------------------------------------


def entries(i: int, room: int, compensation: str, policy: str) -> list[list[int]]:
    """What query i of a local head has: each key is the mean of some tokens."""
    start = PROMPT - (room - SINKS)
    if policy == "roll":
        while i - PROMPT >= FOLD:  # a block more has left the window
            start, i = start + FOLD, i - FOLD
    if compensation == "none":
        return [[j] for j in range(SINKS)] + [[j] for j in range(start, N)]
    return [[j] for j in range(SINKS)] + [list(range(SINKS, start + 1))] + [[j] for j in range(start + 1, N)]


@functools.cache
def by_hand(budget, compensation, policy):
    """Logits of one forward in which each query of a local head after the prompt attends to its entries, one by one."""
    whole, room = PAID[budget]

    class Hand:
        run = SimpleNamespace(title="oracle")

        def __init__(self, spot):
            self.place = spot.place

        def forward(self, layer, q, k, v, real):
            out = exact_attention(q, k, v, causal_mask(N, N), scale=self.place.scale)[0]
            group = q.shape[1] // k.shape[1]
            local = [g for g in range(k.shape[1]) if (self.place.layer, g) not in whole]
            for g, i in itertools.product(local, range(PROMPT, N)):
                mine = [e for e in entries(i, room, compensation, policy) if e[-1] <= i]
                keys, values = (torch.stack([x[0, g, e].mean(0) for e in mine]) for x in (k, v))
                times = torch.tensor([len(e) if compensation == "count" else 1 for e in mine])
                asking = slice(g * group, (g + 1) * group)
                weight = (q[0, asking, i] @ keys.mT * self.place.scale).exp() * times
                out[0, asking, i] = weight @ values / weight.sum(-1, keepdim=True)
            return out

    with listening(MODEL, probe(MODEL), Hand), torch.no_grad():
        return MODEL(tokens(N), use_cache=False).logits


@pytest.mark.parametrize("budget", PAID)
@pytest.mark.parametrize(("compensation", "policy"), FORMS)
@given(cuts=st.lists(st.integers(PROMPT + 1, N - 1), max_size=6, unique=True))
@settings(max_examples=2, deadline=None)
def test_each_query_has_its_entries(budget, compensation, policy, cuts):
    with attach(MODEL, razor(compensation=compensation, policy=policy), budget=budget):
        found = in_pieces(MODEL, tokens(N), [PROMPT, *sorted(cuts)])
    if compensation == "none":  # the key that would be the compensation key is one more of the window
        assert len(entries(PROMPT, PAID[budget][1], "none", policy)) == PAID[budget][1] + N - PROMPT
    torch.testing.assert_close(found, by_hand(budget, compensation, policy))


@given(st.integers(1, 30), st.integers(1, 30), sizes, st.sampled_from([None, 4.0]))
def test_equal_keys_lose_nothing(dropped, kept, sinks, softcap):
    """Dropped keys that are all the same: attention is as if none had been dropped, whatever their values."""
    n = sinks + dropped + kept
    q, k, v = (noise(2, 1, n, 8, name=x).double() for x in "qkv")
    k[:, :, sinks : sinks + dropped] = k[:, :, sinks : sinks + 1].clone()
    position = torch.arange(n, dtype=torch.int32).expand(2, n)
    stays = (position < sinks) | (position >= sinks + dropped - 1)
    merged_k, merged_v = razor().merge(k[:, 0], v[:, 0], position, stays)
    index, times = razor().stands_for(position, stays)
    some = [x[stays].view(2, 1, -1, 8) for x in (merged_k, merged_v)]
    again = razor().stands_for(position[stays].view(2, -1), torch.ones(2, n - dropped + 1, dtype=torch.bool))
    for keys, values, seen, several in (
        (*some, None, again),
        (merged_k[:, None], merged_v[:, None], stays[:, None, None], (index, times)),
    ):
        merged = tuple(x[:, None] for x in several)
        found = ops.decode(q[:, :, -1:], keys, values, visible=seen, merged=merged, softcap=softcap)[0]
        torch.testing.assert_close(found, exact_attention(q[:, :, -1:], k, v, softcap=softcap)[0])


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), sizes)
def test_folding_bit_by_bit_is_the_mean_of_all(blocks, sinks):
    n = sinks + sum(blocks) + 4
    x = noise(1, n, 8).double()
    k, position, end = x, torch.arange(n, dtype=torch.int32)[None], sinks
    for block in blocks:
        end += block
        stays = (position < sinks) | (position >= end)
        k, _ = razor().merge(k, k, position, stays)
        k, position = k[stays][None], position[stays][None]
        index, times = razor().stands_for(position, torch.ones_like(position, dtype=torch.bool))
        if end == sinks:
            assert int(times) == 1
            continue
        assert int(times) == end + 1 - sinks and int(index) == sinks
        torch.testing.assert_close(k[0, sinks], x[0, sinks : end + 1].mean(0))


# --- which heads, and how many keys -----------------------------------------------------------------------------------


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1), st.integers(1, 6), st.integers(1, 4))
def test_the_best_heads_of_the_whole_model_are_whole(seed, induction, echo, layers, g):
    drawn = [noise(layers, g, seed + 1, name=x)[..., -1].exp() for x in ("induction", "echo")]
    wanted = set()
    for score, share in zip(drawn, (induction, echo)):
        ranked = sorted(range(layers * g), key=lambda i: -float(score.flatten()[i]))
        wanted |= set(ranked[: max(1, round(share * layers * g)) if share else 0])
    method = razor(induction_share=induction, echo_share=echo, artefact=scores(*drawn))
    assert set((method.need().flatten() < 1).nonzero()[:, 0].tolist()) == wanted


@example(share=0.5, n=2, sinks=0, window=0, induction=0.0, compensation="none")
@given(st.floats(0.02, 1.0), st.integers(1, 80), sizes, sizes, st.floats(0, 1), st.sampled_from(["count", "none"]))
def test_the_budget_is_never_exceeded_and_nearly_spent(share, n, sinks, window, induction, compensation):
    method = razor(
        sink_tokens=sinks, window_tokens=window, induction_share=induction, compensation=compensation,
    )  # fmt: skip
    given_ = [site(share, queries=n, keys=n, layer=i) for i in range(2)]
    splits = [method._split(n, s) for s in given_]
    held = [n if whole else sink + n - start for sink, start, heads in splits for whole in heads.tolist()]
    paid = 4 * Budget.of(share).tokens(n)
    assert paid - 3 <= sum(held) <= paid and min(held) >= 1
    assert all(sink <= sinks for sink, *_ in splits)


@pytest.mark.parametrize("budget", PAID)
def test_stored_lengths_and_bytes_are_those_of_the_formula(budget):
    with attach(MODEL, razor(), budget=budget) as run, torch.no_grad():
        MODEL(tokens(PROMPT), use_cache=True)
        lengths = Counter(len(h) for layer in run.record.layers.values() for h in layer.kept[0])
        held = run.record.bytes_held
    whole, room = len(PAID[budget][0]), PAID[budget][1]
    assert lengths == Counter({PROMPT: whole, room: 4 - whole})
    per_token = 2 * 16 * 8 + 4  # a key and a value of 16 doubles, a position
    beside = 2 * (2 * 8 + 8)  # in each layer the numbers of two rows, and the prompt's length
    assert held == per_token * (whole * PROMPT + (4 - whole) * room) + beside


@pytest.mark.parametrize("budget", PAID)
def test_gaps_are_looked_for_only_where_there_are_some(budget, monkeypatch):
    """Of rows, not of whole heads, which are most of what is stored."""
    plain, asked = RazorAttention.stands_for, []

    def stands_for(self, k_position, stays):
        asked.extend([k_position.shape[1]] * len(k_position))
        return plain(self, k_position, stays)

    monkeypatch.setattr(RazorAttention, "stands_for", stands_for)
    with attach(MODEL, razor(), budget=budget):
        in_pieces(MODEL, tokens(PROMPT + 1), [PROMPT])
    assert asked == [PAID[budget][1] + 1] * (4 - len(PAID[budget][0]))


@pytest.mark.parametrize("compensation", ["count", "one", "none"])
def test_a_rolling_head_holds_a_window_and_a_block_at_most(compensation):
    whole, room = PAID["20tok"]
    with attach(MODEL, razor(policy="roll", compensation=compensation), budget="20tok") as run, torch.no_grad():
        cache = MODEL(tokens(PROMPT), use_cache=True)[CACHE]
        for i in range(3 * FOLD):
            MODEL(tokens(N)[:, PROMPT + i : PROMPT + i + 1], **{CACHE: cache})
            lengths = {(a, b): len(h) for a, layer in run.record.layers.items() for b, h in enumerate(layer.kept[0])}
            expected = room + (i + 1) % FOLD
            assert all(n == (PROMPT + i + 1 if at in whole else expected) for at, n in lengths.items())


@pytest.mark.parametrize("budget", PAID)
@given(later=st.integers(0, 3 * FOLD))
@settings(max_examples=6, deadline=None)
def test_what_a_rolling_head_reaches_is_what_it_sees(budget, later):
    method, t = razor(policy="roll", compensation="none"), PROMPT + later
    for layer in range(2):
        there = site(budget, queries=1, keys=t + 1, layer=layer, state={"prompt": torch.tensor([PROMPT] * 2)})
        position, heads = torch.arange(t + 1), torch.arange(2)
        seen = method.visible(torch.tensor([[t]] * 2), position.expand(2, -1), heads, there)[:, 0]
        reached = method.reach([t], there)[0]
        assert seen.tolist() == [[j < sinks or t - j <= near for j in range(t + 1)] for sinks, near in reached]
    assert razor(policy="append", compensation="none").reach([t], there) is None


def test_no_whole_heads_and_all_of_them():
    with attach(MODEL, razor(induction_share=0.0, echo_share=0.0), budget=0.5) as run, torch.no_grad():
        MODEL(tokens(PROMPT), use_cache=True)
        assert {len(h) for layer in run.record.layers.values() for h in layer.kept[0]} == {PROMPT // 2}
    ids = tokens(N)
    with attach(MODEL, razor(induction_share=1.0), budget=1.0):
        found = in_pieces(MODEL, ids, [20, 21])
    with torch.no_grad():
        torch.testing.assert_close(found, MODEL(ids).logits)


@pytest.mark.parametrize("policy", ["append", "roll"])
@given(short=st.integers(0, 30))
@settings(max_examples=6, deadline=None)
def test_a_row_that_began_empty_or_short_changes_no_other(policy, short):
    """Also where it comes to be as long as a local head of its neighbour is."""
    a, b = tokens(N, 2)
    prompts, rests = [a[:PROMPT], b[:short]], [a[PROMPT:], b[PROMPT:]]
    with attach(MODEL, razor(policy=policy), budget="20tok"):
        together = read_padded(MODEL, prompts, rests, "left")
        alone = in_pieces(MODEL, a[None], [PROMPT])
    torch.testing.assert_close(together[0], alone)


def test_rows_that_began_empty_are_asked_with_the_others():
    """A local head of the first row and every head of the second hold ten keys: they lie and are asked together."""
    a, b = tokens(PROMPT + 24, 2)
    with attach(MODEL, razor(policy="roll"), budget="20tok"), torch.no_grad():
        ids, real = torch.stack([a[:PROMPT], b[:PROMPT]]), torch.ones(2, PROMPT + 24, dtype=torch.long)
        real[1, :PROMPT] = 0
        position = torch.arange(PROMPT).expand(2, -1)
        cache = MODEL(ids, attention_mask=real[:, :PROMPT], position_ids=position, use_cache=True)[CACHE]
        out = []
        for i in range(24):
            at = torch.tensor([[PROMPT + i], [i]])
            more = torch.stack([a[PROMPT + i : PROMPT + i + 1], b[i : i + 1]])
            seen = real[:, : PROMPT + i + 1]
            out.append(MODEL(more, attention_mask=seen, position_ids=at, **{CACHE: cache}).logits)
        together = torch.cat(out, 1)
        torch.testing.assert_close(together[:1], in_pieces(MODEL, a[None], [PROMPT])[:, PROMPT:])


# --- ranking heads ----------------------------------------------------------------------------------------------------


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 1), st.sampled_from([None, 3.0]), st.integers(0, 9))
def test_looking_back_is_what_the_map_says(period, copies, ahead, softcap, rest):
    n = period * copies + rest % period + 1
    q, k = noise(1, 4, n, 8, name="q").double(), noise(1, 2, n, 8, name="k").double()
    logits = q @ k.repeat_interleave(2, 1).mT * 0.4
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    found = looking_back(q, k, logits.logsumexp(-1), period, ahead, scale=0.4, softcap=softcap)
    if n == period:
        return
    attention, expected = logits.softmax(-1), torch.zeros(1, 4, dtype=torch.float64)
    for i in range(period, n):
        for m in range(1, n):
            if i - m * period >= 0:
                expected += attention[:, :, i, i - m * period + ahead] / (n - period)
    torch.testing.assert_close(found, expected)


def test_heads_made_for_it_are_found():
    """An echo head asks for its own token, an induction head for the token after an earlier copy of its own."""
    period, n = 20, 80
    token = torch.arange(n) % period
    own = torch.nn.functional.one_hot(token, period).double()
    before = torch.nn.functional.one_hot(token.roll(1), period).double()
    before[0] = 0  # no token comes before the first
    q, k = own.expand(1, 2, n, period) * 30, torch.stack([own, before])[None]
    logits = (q @ k.mT).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    # every copy of the token is as good as the others, the query's own among them in the echo head
    for ahead, expected in ((0, [sum(m / (m + 1) for m in (1, 2, 3)) / 3, 0.0]), (1, [0.0, 1.0])):
        found = looking_back(q, k, logits.logsumexp(-1), period, ahead, scale=1.0, softcap=None)
        torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64))


def test_calibration_reads_random_tokens_of_the_samples_four_times_over():
    method, samples, seen = RazorAttention(probe_tokens=9), [tokens(40), tokens(30)], []
    subject = Subject(tiny(layers=3))
    plain = subject.capture_qkv
    subject.capture_qkv = lambda texts: plain(seen.extend(texts) or texts)
    told = []
    artefact = method.calibrate(subject, samples, lambda *said: told.append(said))
    assert told == [(1, 2, "ranking heads"), (2, 2, "ranking heads")]
    known = set(torch.cat(samples, 1).flatten().tolist())
    for text, sample in zip(seen, samples):
        assert text.shape == (1, 37) and text[0, 0] == sample[0, 0]
        assert torch.equal(text[0, 1:], text[0, 1:10].repeat(4)) and set(text[0].tolist()) <= known
        assert len(set(text[0, 1:10].tolist())) == 9
    assert not torch.equal(*seen)
    expected = {name: torch.zeros(3, 4) for name in ("induction", "echo")}
    for layer, q, k, _ in plain(seen):
        logits = (q @ k.repeat_interleave(2, 1).mT * 16**-0.5)[0]
        attention = logits.masked_fill(torch.ones(37, 37, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        for name, ahead in (("induction", 1), ("echo", 0)):
            for i in range(10, 37):
                for j in range(i - 9, 0, -9):
                    expected[name][layer] += attention[:, i, j + ahead].float() / 27 / 2
    for name, score in expected.items():
        torch.testing.assert_close(artefact.tensors[name], score.view(3, 2, 2).amax(-1))
        assert artefact.figures[f"best {name}"][0] == round(float(artefact.tensors[name].max()), 4)
    assert artefact.options["probe_tokens"] == 9 and artefact.data.startswith("2 rows, 70 tokens")


def test_few_different_tokens_are_drawn_again():
    text = RazorAttention(probe_tokens=8)._text(torch.tensor([5, 6, 7]), 0)
    assert text.shape == (1, 32) and all(2 <= text[0, :8].tolist().count(i) <= 3 for i in (5, 6, 7))


def test_no_samples_are_refused():
    with pytest.raises(BadInput, match=r"calibrate: there are no samples\. Give rows of token ids \[1 n\]"):
        RazorAttention().calibrate(Subject(tiny()), [])


# --- errors -----------------------------------------------------------------------------------------------------------


def test_scores_that_are_missing_or_foreign_are_refused():
    assert RazorAttention().check(site(queries=1, keys=1)) == [
        "no heads were ranked for this model: saccade calibrate razor-attention"
    ]
    assert razor().check(site(queries=1, keys=1, layers=5)) == [
        "its scores are for 2 layers of 2 key/value heads, here: 5 of 2"
    ]
    with pytest.raises(CannotRun, match="saccade calibrate razor-attention"):
        attach(tiny(), RazorAttention(), budget=0.5)


def test_options_that_cannot_be():
    for name in ("induction_share", "echo_share"):
        for share in (-0.1, 1.5, math.nan):
            said = rf"razor-attention\.{name}={share}: it takes a share from 0 to 1\. Leave it away"
            with pytest.raises(BadOption, match=said):
                RazorAttention(**{name: share})
    with pytest.raises(BadOption, match=r"fold_tokens=0: it takes at least 1\. Leave it away for 64"):
        RazorAttention(fold_tokens=0)
    with pytest.raises(BadOption, match=r"probe_tokens=1: one token has no other after it, and it takes at least 2"):
        RazorAttention(probe_tokens=1)
    with pytest.raises(BadOption, match=r"compensation='two': it takes 'count' or 'one' or 'none'"):
        RazorAttention(compensation="two")


@pytest.mark.parametrize("policy", ["append", "roll"])
def test_guesses_are_taken_back_only_after_the_prompt_and_where_windows_roll(policy):
    with attach(MODEL, razor(policy=policy), budget=0.5) as run, torch.no_grad():
        cache = run.new_cache()
        with pytest.raises(CannotRun, match="assisted decoding with razor-attention: guessed tokens are verified"):
            cache.layers[0].activate_past_recording()
        MODEL(tokens(PROMPT), **{CACHE: cache})
        if policy == "roll":
            cache.layers[0].activate_past_recording()
        else:
            with pytest.raises(CannotRun, match="assisted decoding with razor-attention"):
                cache.layers[0].activate_past_recording()


def test_shipped_scores_are_those_of_smollm2():
    shipped = Artefact.load(SHIPPED / "razor-attention" / "smollm2")
    assert shipped.method == "razor-attention" and shipped.tensors.keys() == {"induction", "echo"}
    for score in shipped.tensors.values():
        assert score.shape == (30, 3) and score.dtype == torch.float32 and ((score >= 0) & (score <= 1)).all()
