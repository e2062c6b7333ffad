"""DuoAttention under gates made by hand, against a dense pass under the mask of each head."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, fingerprint
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, CannotRun
from saccade.core.paths import SHIPPED
from saccade.methods.cache.duo_attention import DuoAttention
from tests.methods.handmade import in_pieces, site, tiny, tokens, under_mask

MODEL, N, PROMPT = tiny(), 60, 48
GATES = torch.tensor([[0.9, 0.1], [0.4, 0.6]])


def duo(**changes):
    made = Artefact("duo-attention", {"gates": GATES}, "tiny", fingerprint(MODEL))
    return DuoAttention(**{"sink_tokens": 3, "recent_tokens": 6, **changes}, artefact=made)


def head_masks(full: set[tuple[int, int]], sinks: int, recent: int, dense_until: int = 0):
    """As the sheet says: a streaming head sees j < sinks or i - j <= recent; rows before `dense_until` see all."""
    i, j = torch.arange(N)[:, None], torch.arange(N)

    def mask(layer, q, k):
        near = (j < sinks) | (i - j <= recent) | (i < dense_until)
        whole = torch.ones(N, N, dtype=torch.bool)
        return torch.stack([whole if (layer, head // 2) in full else near for head in range(4)])[None]

    return mask


# budget -> heads that it pays for at 48 tokens: (4 (b - 9)) // 39
PAID = {"9tok": set(), "20tok": {(0, 0)}, 0.75: {(0, 0), (1, 1)}, "40tok": {(0, 0), (1, 1), (1, 0)}}


@pytest.mark.parametrize("budget", PAID)
@pytest.mark.parametrize("prefill", ["lambda", "dense"])
@given(cuts=st.lists(st.integers(PROMPT + 1, N - 1), max_size=4, unique=True))
@settings(max_examples=5, deadline=None)
def test_each_head_follows_its_mask(budget, prefill, cuts):
    ids = tokens(N)
    with attach(MODEL, duo(prefill=prefill), budget=budget):
        found = in_pieces(MODEL, ids, [PROMPT, *sorted(cuts)])
    mask = head_masks(PAID[budget], 3, 6, PROMPT if prefill == "dense" else 0)
    torch.testing.assert_close(found, under_mask(MODEL, ids, mask))


@pytest.mark.parametrize("budget", PAID)
def test_stored_lengths_and_bytes_are_those_of_the_formula(budget):
    with attach(MODEL, duo(), budget=budget) as run, torch.no_grad():
        MODEL(tokens(PROMPT), use_cache=True)
        lengths = Counter(len(h) for layer in run.record.layers.values() for h in layer.kept[0])
        held = run.record.bytes_held
    full = len(PAID[budget])
    assert lengths == Counter({PROMPT: full, 9: 4 - full})
    per_token = 2 * 16 * 8 + 4  # a key and a value of 16 doubles, a position
    beside = 2 * (2 * 8 + 8)  # in each layer the numbers of two rows, and the prompt's length
    assert held == per_token * (full * PROMPT + (4 - full) * 9) + beside


@given(st.floats(0.02, 1.0), st.integers(1, N), st.integers(0, 8), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_budget_is_never_exceeded(share, n, sinks, recent):
    method = duo(sink_tokens=sinks, recent_tokens=recent)
    splits = [method._split(n, site(share, queries=n, keys=n, layer=i)) for i in range(2)]
    held = [n if full else min(n, s + r) for s, r, heads in splits for full in heads.tolist()]
    assert sum(held) <= 4 * Budget.of(share).tokens(n)


def test_full_budget_is_dense():
    ids = tokens(N)
    with attach(MODEL, duo(), budget=1.0):
        found = in_pieces(MODEL, ids, [20, 21])
    with torch.no_grad():
        torch.testing.assert_close(found, MODEL(ids).logits)


def test_equal_gates_are_drawn_the_same_for_the_same_seed():
    made = Artefact("duo-attention", {"gates": torch.ones(8, 2)}, "tiny", "")
    method = DuoAttention(sink_tokens=1, recent_tokens=2, artefact=made)

    def full(seed):
        here = [site(0.5, queries=40, keys=40, layer=i, layers=8, seed=seed) for i in range(8)]
        return torch.stack([method._split(40, s)[2] for s in here])

    assert torch.equal(full(0), full(0)) and not torch.equal(full(0), full(1))
    assert int(full(0).sum()) == 16 * (20 - 3) // (40 - 3)


def test_gates_that_are_missing_or_foreign_are_refused():
    assert DuoAttention().check(site(queries=1, keys=1)) == [
        "no gates were trained for this model: saccade calibrate duo-attention"
    ]
    assert duo().check(site(queries=1, keys=1, layers=5)) == [
        "its gates are for 2 layers of 2 key/value heads, here: 5 of 2"
    ]
    with pytest.raises(CannotRun, match="saccade calibrate duo-attention"):
        attach(tiny(), DuoAttention(), budget=0.5)


def test_options_that_cannot_be():
    with pytest.raises(BadOption, match=r"duo-attention\.recent_tokens=0: it takes at least 1"):
        DuoAttention(recent_tokens=0)
    with pytest.raises(BadOption, match=r"train_keys=11: keys are named first to tenth. Give at most 10"):
        DuoAttention(train_keys=11)
    with pytest.raises(BadOption, match=r"duo-attention\.learning_rate=0: it takes a number above 0"):
        DuoAttention(learning_rate=0)
    with pytest.raises(BadOption, match=r"prefill='sparse': it takes 'lambda' or 'dense'"):
        DuoAttention(prefill="sparse")


def test_shipped_gates_are_those_of_smollm2():
    shipped = Artefact.load(SHIPPED / "duo-attention" / "smollm2")
    gates = shipped.tensors["gates"]
    assert shipped.method == "duo-attention" and gates.shape == (30, 3) and gates.dtype == torch.float32
    assert ((gates >= 0) & (gates <= 1)).all()
