"""Influence against finite differences, costs and spans against plain loops, windows against a dense masked pass."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, fingerprint
from saccade.attach.calibration import Subject
from saccade.attach.influence import Influence, Text
from saccade.attach.listening import listening
from saccade.attach.probe import probe
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.selection import causal_mask
from saccade.methods.sparse.moa import LIMITS, REACH, MoA
from tests.conformance.cases import Words
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

MODEL, N, PROMPT = tiny(), 60, 48
# two plans for 2 layers of 2 heads; at 48 tokens 12, 16, 8, 12 keys (a quarter), then 48, 32, 24, 24 (two thirds)
ALPHA = torch.tensor([[[12.0, 0.0], [-8.0, 8.0]], [[8.0, 0.0], [0.0, 24.0]]])
BETA = torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[0.0, 0.5], [0.25, 0.0]]])


def moa(**changes):
    made = Artefact("moa", {"alpha": ALPHA, "beta": BETA}, "tiny", fingerprint(MODEL))
    return MoA(**{"sink_tokens": 3, **changes}, artefact=made)


# --- offline ----------------------------------------------------------------------------------------------------------


class Spelt:
    """Dense attention that spells its map out, with a number added to every logit: what autograd says of both."""

    def __init__(self, spot):
        self.place, self.run = spot.place, SimpleNamespace(title="oracle")

    def forward(self, layer, q, k, v, real):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        logits = (q @ k.mT * self.place.scale).masked_fill(~causal_mask(q.shape[2], q.shape[2]), -torch.inf)
        self.added = torch.zeros_like(logits, requires_grad=True)
        self.map = (logits + self.added).softmax(-1)
        self.map.retain_grad()
        return self.map @ v


def test_influence_is_what_autograd_says():
    """Making an entry smaller by a factor 1 - e moves the loss by e (1 - A) E; a row's only entry by -A G."""
    model, taps = tiny().float(), []
    influence = Influence(Subject(model), MoA(block_tokens=1), [tokens(20)])
    text = Text(tokens(20), torch.linspace(0, 1, 20)[None])
    found = influence.of_text(text)
    with listening(model, probe(model), lambda spot: taps.append(Spelt(spot)) or taps[-1]):
        influence._loss(text).backward()
    for layer, tap in enumerate(taps):
        a, e = tap.map[0], found[layer]
        torch.testing.assert_close((e * (1 - a))[:, 1:], -tap.added.grad[0, :, 1:])
        torch.testing.assert_close(e[:, 0, 0], -(a * tap.map.grad[0])[:, 0, 0])
        assert e.triu(1).abs().max() == 0


def test_blocks_hold_the_sums_of_their_entries():
    text = Text(tokens(20), torch.linspace(0, 1, 20)[None])
    found, in_blocks = (Influence(Subject(MODEL), MoA(block_tokens=n), [tokens(20)]).of_text(text) for n in (1, 6))
    whole = torch.nn.functional.pad(found, (0, 4, 0, 4)).unflatten(3, (4, 6)).unflatten(2, (4, 6)).sum((3, 5))
    torch.testing.assert_close(in_blocks, whole)


@given(st.integers(1, 8), st.integers(0, 8))
@settings(max_examples=10, deadline=None)
def test_a_rule_costs_what_it_leaves_out(block, sinks):
    n, method = 40, MoA(block_tokens=block, sink_tokens=sinks)
    blocks = -(-n // block)
    maps, rules = noise(2, 2, blocks, blocks).abs(), method.rules([10, 20, n])
    found = method.costs(maps, rules, n)
    for r in range(0, rules.shape[1], 7):
        span = float(rules[0, r] + rules[1, r] * n)
        width = blocks if span >= n else max(1, int((min(span, n) - sinks) // block))
        out = [(i, j) for i in range(blocks) for j in range(i + 1) if i - j >= width and j >= sinks // block]
        wanted = sum((maps[..., i, j].double() for i, j in out), torch.zeros(2, 2, dtype=torch.float64))
        torch.testing.assert_close(found[..., r], wanted)


def test_rules_make_a_span_at_every_length():
    rules = MoA(rule_steps=4).rules([64, 128, 256])
    for n in (64, 256, REACH * 256):
        assert (rules[0] + rules[1] * n > 0).all() and (n == 64 or (rules[0] + rules[1] * n <= n).all())
    assert [0.0, 1.0] in rules.T.tolist()


@pytest.fixture
def subject(tmp_path, monkeypatch):
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    made = Subject(MODEL)
    made.tokenizer = Words()
    return made


def test_a_profile_that_broke_off_goes_on(subject, tmp_path):
    rows, steps = list(tokens(128, 3).split(1)), []
    short = {"rule_steps": 4, "answer_keys": 4, "block_tokens": 8}

    def stop(done, total, what):
        steps.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MoA(**short).calibrate(subject, rows, stop)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    resumed = MoA(**short).calibrate(subject, rows, lambda done, *_: steps.append(done))
    assert steps == [1, 2, 3, 4, 4, 5, 6] and not list(tmp_path.rglob("*.safetensors"))
    at_once = MoA(**short).calibrate(subject, rows)
    assert all(torch.equal(resumed.tensors[name], at_once.tensors[name]) for name in ("alpha", "beta"))
    assert at_once.tensors["alpha"].shape == (2, 2, len(LIMITS))
    losses = at_once.figures["held_out_losses"]
    assert list(losses) == ["all", "32", "64", "128"] and len(set(losses.values())) > 1


def test_plans_keep_to_their_densities_at_every_length(subject):
    made = MoA(rule_steps=8, answer_keys=4, block_tokens=8).calibrate(subject, [tokens(128)])
    for n in (32, 64, 128, 256):
        spans = (made.tensors["alpha"] + made.tensors["beta"] * n).clamp(max=n) / n
        assert (spans.mean((0, 1)) <= torch.tensor(LIMITS) + 1e-6).all() and spans.min() > 0
    kinds = torch.stack([made.tensors["alpha"], made.tensors["beta"]], -1)
    assert all(len(kinds[layer, :, r].unique(dim=0)) <= 2 for layer in range(2) for r in range(len(LIMITS)))


# --- one prompt -------------------------------------------------------------------------------------------------------


def spans_by_hand(n, held):
    """As the docstring says, with numbers."""
    if held >= n:
        return [[n] * 2] * 2
    spans = [[[min(n, max(1, float(a + b * n))) for a, b in zip(*ab)] for ab in zip(*h)] for h in zip(ALPHA, BETA)]
    plans = [[[1.0] * 2] * 2, *[[[h[p] for h in layer] for layer in spans] for p in range(2)], [[float(n)] * 2] * 2]
    mean = [sum(map(sum, plan)) / 4 for plan in plans]
    last = max(i for i, m in enumerate(mean) if m <= held)
    part = (held - mean[last]) / (mean[last + 1] - mean[last])
    return [[int(a + part * (b - a) + 1e-9) for a, b in zip(*two)] for two in zip(plans[last], plans[last + 1])]


@given(st.integers(1, 200), st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_spans_are_between_two_plans_and_within_the_budget(n, share):
    held = Budget(share).tokens(n)
    spans = moa().spans(n, held)
    assert spans.tolist() == spans_by_hand(n, held)
    assert 4 * held - 4 < int(spans.sum()) <= 4 * held and int(spans.min()) >= 1


def head_masks(spans, sinks):
    i, j = torch.arange(N)[:, None], torch.arange(N)

    def mask(layer, q, k):
        near = [(j < min(sinks, s)) | (i - j <= s - min(sinks, s)) | (s >= PROMPT) for s in spans[layer]]
        return torch.stack([near[head // 2].expand(N, N) for head in range(4)])[None]

    return mask


@pytest.mark.parametrize("budget", ["1tok", 0.25, 0.5, "40tok", 1.0])
@given(cuts=st.lists(st.integers(PROMPT + 1, N - 1), max_size=4, unique=True))
@settings(max_examples=3, deadline=None)
def test_each_head_follows_its_mask(budget, cuts):
    ids, spans = tokens(N), spans_by_hand(PROMPT, Budget.of(budget).tokens(PROMPT))
    with attach(MODEL, moa(), budget=budget) as run:
        found = in_pieces(MODEL, ids, [PROMPT, *sorted(cuts)])
        kept = Counter(len(h) for layer in run.record.layers.values() for h in layer.kept[0])
    torch.testing.assert_close(found, under_mask(MODEL, ids, head_masks(spans, 3)))
    assert kept == Counter(s if s < PROMPT else N for layer in spans for s in layer)  # windows do not grow


@given(st.integers(1, 70), st.integers(0, 30), st.floats(0.02, 1))
@settings(max_examples=20, deadline=None)
def test_reach_says_in_numbers_what_is_visible(prompt, later, share):
    n = prompt + later
    here = site(share, queries=1, keys=n, state={"prompt": torch.tensor([prompt] * 2)})
    seen = moa().visible(torch.full((2, 1), n), torch.arange(n).expand(2, -1), torch.arange(2), here)
    for found, (sinks, recent) in zip(seen[:, 0].tolist(), moa().reach([n] * 2, here)[0]):
        assert found == [j < sinks or n - j <= recent for j in range(n)]


def test_plans_that_are_missing_or_foreign_are_refused():
    assert MoA().check(site(queries=1, keys=1)) == ["no plan was searched for this model: saccade calibrate moa"]
    assert moa().check(site(queries=1, keys=1, layers=5)) == [
        "its plan is for 2 layers of 2 key/value heads, here: 5 of 2"
    ]
    with pytest.raises(CannotRun, match="saccade calibrate moa"):
        attach(tiny(), MoA(), budget=0.5)
    with pytest.raises(BadInput, match="no samples"):
        MoA().calibrate(Subject(MODEL), [])


def test_options_that_cannot_be():
    with pytest.raises(BadOption, match=r"moa\.block_tokens=0: it takes at least 1"):
        MoA(block_tokens=0)
    with pytest.raises(BadOption, match=r"moa\.rules_per_layer=3: it takes at most 2"):
        MoA(rules_per_layer=3)
    with pytest.raises(BadOption, match=r"moa\.answer_keys=11: it takes at most 10"):
        MoA(answer_keys=11)
    with pytest.raises(BadOption, match=r"moa\.prose_weight=-1.0: it takes a number from 0"):
        MoA(prose_weight=-1.0)
    with pytest.raises(BadOption, match=r"moa\.search_density=0.0: it takes a share of the pairs, above 0 to 1"):
        MoA(search_density=0.0)
