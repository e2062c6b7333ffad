"""Combiner: p(j|i) written out is what both calls of attention come to, a full distribution over what i may see."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saccade.core.errors import BadOption
from saccade.core.method import Slot
from saccade.methods.mixers.combiner import Combiner
from saccade.methods.nets import LanguageModel, VisionModel
from tests.mixers import assert_as_good, made, noise

PATTERNS = ("fixed", "logsparse", "axial")
FORMS = [
    {"pattern": "fixed"},
    {"pattern": "fixed", "pooling": "mean"},
    {"pattern": "logsparse", "pooling": "deepsets"},
    {"pattern": "logsparse"},
    {"pattern": "axial"},
    {"pattern": "axial", "row_summary": "wsum"},
    {"pattern": "axial", "row_summary": "none"},
]


def layer(causal=True, grid=None, **options):
    return made(lambda slot: Combiner(slot, **{"segment_tokens": 4} | options), causal=causal, grid=grid)


def named(form):
    return "-".join(form.values())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("form", FORMS, ids=named)
def test_two_calls_of_attention_are_the_distribution(form, causal):
    """Lengths with a part of a segment at the end, a whole one, and one token."""
    mixer = layer(causal, **form)
    for n in (1, 8, 11):
        x = noise(1, n, 16).requires_grad_()
        ours, theirs = mixer(x)[0], mixer.reference(x)
        assert_as_good(ours, theirs, named(form))
    wanted = [x, *mixer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (ours, theirs))):
        assert_as_good(a, b, f"gradients, {named(form)}")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_token_that_may_be_seen_is_seen_once_and_has_a_share(pattern, causal):
    mixer = layer(causal, pattern=pattern)
    for n in (1, 7, 16):
        for i in range(n):
            size = 1 if pattern == "logsparse" else 4
            near = [j for j in range(i // size * size, min(n, (i // size + 1) * size)) if j <= i or not causal]
            far = [j for members, _ in mixer.regions(i, n) for j in members]
            assert sorted(near + far) == list(range(i + 1 if causal else n))
        share = mixer.distribution(noise(1, n, 16))
        assert_as_good(share.sum(-1), torch.ones(1, 4, n).double(), "sums")
        allowed = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
        assert torch.equal(share > 0, allowed.expand(1, 4, -1, -1))


@pytest.mark.parametrize("pattern", ["fixed", "axial"])
def test_one_segment_is_dense_attention(pattern):
    x, dense = noise(2, 9, 16), made("full")
    mixer = layer(pattern=pattern, segment_tokens=9)
    mixer.load_state_dict(dense.state_dict(), strict=False)
    assert_as_good(mixer(x)[0], dense(x)[0], pattern)


def test_two_tokens_are_dense_in_the_logsparse_pattern():
    x, dense, mixer = noise(2, 2, 16), made("full"), layer(pattern="logsparse")
    mixer.load_state_dict(dense.state_dict())
    assert_as_good(mixer(x)[0], dense(x)[0], "logsparse")


def test_a_region_of_equal_keys_counts_as_one_key():
    """No log of its size is added: of four equal tokens before it, the fifth gives each an eighth, not a fifth."""
    mixer = layer()
    with torch.no_grad():
        mixer.qkv.weight.zero_()
    share = mixer.distribution(noise(1, 5, 16))
    assert_as_good(share[0, 0, 4], torch.tensor([0.125] * 4 + [0.5]).double(), "shares")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_steps_and_pieces_are_one_pass(pattern):
    mixer, x = layer(pattern=pattern), noise(2, 11, 16)
    whole, _ = mixer(x)
    first, state = mixer(x[:, :6])
    steps = []
    for t in range(6, 11):
        y, state = mixer.step(x[:, t], state)
        steps.append(y)
    assert_as_good(torch.cat([first, torch.stack(steps, 1)], 1), whole, pattern)


def test_rows_are_those_of_the_picture():
    grid = (3, 5)
    mixer = layer(False, grid, pattern="axial", segment_tokens=2)
    assert [members for members, _ in mixer.regions(7, 15)] == [list(range(5)), list(range(10, 15))]
    assert [at for _, at in mixer.regions(7, 15)] == [2, 12]
    x = noise(1, 15, 16)
    assert_as_good(mixer(x)[0], mixer.reference(x), "axial")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nets_can_be_trained_with_it(pattern):
    mixer = f"combiner:pattern={pattern},segment_tokens=4"
    logits, _ = LanguageModel(16, mixer=mixer, channels=16, layers=1)(torch.arange(14)[None])
    classes = VisionModel(3, (1, 4, 4), patch=1, mixer=mixer, channels=16, layers=1)(noise(2, 1, 4, 4).float())
    (logits.square().mean() + classes.square().mean()).backward()
    assert logits.isfinite().all() and classes.isfinite().all()


def test_options_that_cannot_be():
    for options, text in (
        ({"pattern": "mixture"}, r"combiner\.pattern='mixture': it takes 'fixed' or 'logsparse' or 'axial'"),
        ({"pooling": "sum"}, r"combiner\.pooling='sum': it takes 'max'"),
        ({"row_summary": "all"}, r"combiner\.row_summary='all': it takes 'proj'"),
        ({"segment_tokens": 0}, r"combiner\.segment_tokens=0: it takes at least 1"),
    ):
        with pytest.raises(BadOption, match=text):
            layer(**options)
    with pytest.raises(BadOption, match="combiner in heads of 3 channels: they cannot be turned in pairs"):
        Combiner(dataclasses.replace(Slot(16, 4), channels=12))
