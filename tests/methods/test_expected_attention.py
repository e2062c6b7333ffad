"""Expected Attention as plain loops, what its closed form says, its budget, and inside a model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach import attach, explain
from saccade.core.errors import BadOption
from saccade.core.site import Seen
from saccade.methods.cache.expected_attention import ExpectedAttention
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

D = 8
FREQUENCIES = [1.0, 0.3, 0.1, 0.02]


def turn(x, shifts):
    """Pairs (i, i + 4) rotated by shift times frequency, as Llama does."""
    angle = shifts[:, None].double() * torch.tensor(FREQUENCIES).double()
    cos, sin = angle.cos().repeat(1, 2).to(x.dtype), angle.sin().repeat(1, 2).to(x.dtype)
    half = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
    return x * cos + half * sin


def rotation(position):
    """The same as a matrix."""
    out = torch.zeros(D, D).double()
    for i, f in enumerate(FREQUENCIES):
        c, s = math.cos(position * f), math.sin(position * f)
        j = i + D // 2
        out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def written_out(q, k, v, method, seen):
    """Section 3 for one query head: q [w d] the last queries of `seen` tokens; scores of the keys after the sinks."""
    first = max(method.sink_tokens, seen - len(q))
    raw = [rotation(p).T @ q[p - (seen - len(q))] for p in range(first, seen)]
    mean = sum(raw) / len(raw)
    spread = sum(torch.outer(x - mean, x - mean) for x in raw) / len(raw)
    mid = sum(rotation(p) for p in range(seen, seen + method.future_tokens)) / method.future_tokens
    mean, spread = mid @ mean, mid @ spread @ mid.T
    logits = []
    for key in k[method.sink_tokens :]:
        z = float(mean @ key) / D**0.5
        logits.append(z + (float(key @ spread @ key) / (2 * D) if method.covariance else 0.0))
    return torch.tensor(logits).double().softmax(-1)


options = st.builds(
    ExpectedAttention,
    sink_tokens=st.integers(0, 5),
    sample_tokens=st.integers(1, 40),
    future_tokens=st.integers(1, 20),
    covariance=st.booleans(),
    epsilon=st.sampled_from([0.0, 0.02]),
)


@given(options, st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_the_score_is_that_of_the_paper(method, n):
    w = min(method.sample_tokens, n)
    q, k, v = (noise(2, h, m, D, name=x).double() for x, h, m in (("q", 4, w), ("k", 2, n), ("v", 2, n)))
    here = site(1.0, queries=0, keys=n, turn=turn)
    found = method.score(Seen(k, v, torch.arange(n).expand(2, 2, n), q), here)
    sinks = min(method.sink_tokens, n)
    assert (found[..., :sinks] == torch.inf).all()
    for row in range(2):
        for g in range(2):
            if sinks == n:
                continue
            paid = sum(written_out(q[row, h], k[row, g], v[row, g], method, n) for h in (2 * g, 2 * g + 1)) / 2
            expected = (paid + method.epsilon) * v[row, g, sinks:].norm(dim=-1)
            torch.testing.assert_close(found[row, g, sinks:], expected)


def test_the_mean_over_positions_may_come_in_pieces(monkeypatch):
    q, k = noise(1, 4, 20, D, name="q").double(), noise(1, 2, 20, D, name="k").double()
    seen, here = Seen(k, k, torch.arange(20).expand(1, 2, 20), q), site(1.0, queries=0, keys=20, turn=turn)
    whole = ExpectedAttention(future_tokens=30).score(seen, here)
    monkeypatch.setattr("saccade.methods.cache.expected_attention.PIECE", 7)
    torch.testing.assert_close(ExpectedAttention(future_tokens=30).score(seen, here), whole)


def test_the_closed_form_is_the_mean_over_normal_queries():
    """exp(mu.k + k Sigma k / 2) against a million queries drawn from that distribution: within its own deviation."""
    mean, half = noise(D, name="mean").double() / 4, noise(D, D, name="half").double() / 8
    key = noise(D, name="key").double()
    drawn = torch.exp((mean + noise(10**6, D, name="drawn").double() @ half.T) @ key)
    closed = math.exp(float(mean @ key + key @ half @ half.T @ key / 2))
    assert abs(float(drawn.mean()) - closed) <= 4 * float(drawn.std()) / 1000


@pytest.mark.parametrize("budget", [0.3, "5tok", 1.0])
def test_decoding_sees_the_kept_keys_and_the_first_are_among_them(budget):
    model, ids, n = tiny(), tokens(50), 40
    with attach(model, ExpectedAttention(), budget=budget) as run:
        found = in_pieces(model, ids, [n, n + 1, n + 4])
        kept = [run.record.layer(i).kept[0] for i in range(2)]
    assert all(torch.equal(head[:4].long(), torch.arange(4)) for layer in kept for head in layer)

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, 50, 50, dtype=torch.bool)
        for head in range(4):
            allowed[:, head, n:, :n] = torch.isin(torch.arange(n), kept[layer][head // 2])
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_models_that_it_cannot_see_through_are_refused():
    said = {"gpt-neox": "how it marks positions is not known", "gemma2": "capped at 50.0 the mean has no closed form"}
    for family, text in said.items():
        assert any(text in reason for reason in explain(models.tiny(family), ExpectedAttention()))


def test_options_that_cannot_be_used_say_why():
    for name in ("sample_tokens", "future_tokens"):
        with pytest.raises(BadOption, match=rf"expected-attention\.{name}=0: there would be no query. Give at least 1"):
            ExpectedAttention(**{name: 0})
    with pytest.raises(BadOption, match=r"expected-attention\.epsilon=-1.0: it takes a number from 0. Leave it away"):
        ExpectedAttention(epsilon=-1.0)
