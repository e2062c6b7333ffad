"""Gates by plain loops; what is loaded from far away and where it is placed; landmarks in a text."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import BadOption
from saccade.core.selection import causal_mask
from saccade.methods.mixers._places import placed_apart
from saccade.methods.mixers.landmark import is_landmark, with_landmarks
from saccade.methods.nets import LanguageModel
from tests.mixers import assert_as_good, made, noise


def layer(causal=True, **options):
    return made("landmark:" + ",".join(f"{name}={value}" for name, value in options.items()), causal=causal)


def parts(n, heads=2, size=8):
    return tuple(noise(1, heads, n, size + i)[..., :size] for i in range(3))


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 15), block=st.integers(2, 5), read=st.integers(0, 3), causal=st.booleans())
def test_every_size_is_what_loops_compute(n, block, read, causal):
    mixer = layer(causal, block_tokens=block, read_blocks=read * causal)
    x = noise(1, n, 16).requires_grad_()
    ours, theirs = mixer(x)[0], mixer.reference(x)
    assert_as_good(ours, theirs, "output")
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    assert_as_good(*grads, "gradient")


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, 15), min_size=1, max_size=4, unique=True).map(sorted), read=st.integers(0, 2))
def test_pieces_are_one_pass(cuts, read):
    mixer, x = layer(block_tokens=3, read_blocks=read), noise(2, 16, 16)
    state, found = {}, []
    for start, end in zip([0, *cuts], [*cuts, 16]):
        part, state = mixer(x[:, start:end], state)
        found.append(part)
    assert_as_good(torch.cat(found, 1), mixer(x)[0], "pieces")


def test_all_blocks_that_are_loaded_are_where_they_are():
    x = noise(2, 16, 16)
    assert_as_good(layer(block_tokens=4, read_blocks=3)(x)[0], layer(block_tokens=4)(x)[0], "all of three")


@pytest.mark.parametrize("read", [0, 2])
def test_gates_are_merged_in_low_precision_too(read):
    y = layer(block_tokens=4, read_blocks=read).bfloat16()(noise(2, 16, 16, dtype=torch.bfloat16))[0]
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_one_open_block_is_dense_attention():
    mixer, x = layer(block_tokens=16), noise(2, 11, 16)
    assert_as_good(mixer(x)[0], dense_like(mixer)(x)[0], "dense")


def dense_like(mixer):
    full = made("full")
    full.load_state_dict(mixer.state_dict())
    return full


def test_gates_that_weigh_their_blocks_rightly_make_it_dense_attention():
    """For the last query: landmarks whose logit is the log-sum-exp of their block; nothing of their values."""
    mixer = layer(block_tokens=4)
    q, k, v = parts(14, heads=4, size=4)
    at = torch.arange(14)
    turned_q, turned_k = placed_apart(q, at)[:, :, -1], placed_apart(k, at)
    logits = (turned_k @ turned_q[..., None])[..., 0] / math.sqrt(4)
    marks = is_landmark(14, 4)
    for last in (3, 7, 11):
        wanted = logits[..., last - 3 : last].logsumexp(-1)[..., None] * math.sqrt(4)
        mark = wanted * turned_q / turned_q.square().sum(-1, keepdim=True)
        k[:, :, last] = placed_apart(mark[:, :, None], -at[last : last + 1])[:, :, 0]
        v[:, :, last] = 1e6
    found = mixer._attend(q[:, :, -1:], k, v)[:, :, 0]
    weights = logits.masked_fill(marks, -torch.inf).softmax(-1)
    assert_as_good(found, (weights[..., None] * v).sum(2), "dense")


def test_what_is_loaded_is_read_alike_from_any_distance():
    """The first block, which its landmark calls, as if it were two blocks away; others are not loaded."""
    mixer, (q, k, v) = layer(block_tokens=4, read_blocks=1), parts(31, heads=4, size=4)
    query, k[:, :, 3::4] = q[:, :, -1:], 0
    asked = placed_apart(query, torch.tensor([2 * 4 + 2]))
    k[:, :, 3] = placed_apart(9 * asked, torch.tensor([-3]))[:, :, 0]
    outs = []
    for skipped in (4, 12, 20):
        there = [x[:, :, [*range(4), *range(skipped, 31)]] for x in (k, v)]
        outs.append(mixer._attend(query, *there))
    assert_as_good(outs[1], outs[0], "nearer")
    assert_as_good(outs[2], outs[0], "nearer still")
    v[:, :, :3] += 1
    assert not torch.allclose(mixer._attend(query, k, v), outs[0])


@pytest.mark.parametrize("read", [0, 1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_density_counts_own_keys_landmarks_and_what_is_loaded(read, causal):
    mixer, n, pairs = layer(causal, block_tokens=4, read_blocks=read * causal), 18, 0
    assert mixer.density() is None
    for i in range(n):
        own = [j for j in range(n) if j // 4 == i // 4 and j % 4 < 3 and (j <= i or not causal)]
        closed = [b for b in range(n // 4) if (b < i // 4 if causal else b != i // 4)]
        pairs += len(own) + len(closed) + 3 * (min(read, len(closed)) if read and causal else len(closed))
    mixer(noise(1, n, 16))
    assert mixer.density() == pytest.approx(pairs / (int(causal_mask(n, n).sum()) if causal else n * n))


def test_a_text_gets_a_landmark_after_every_block_and_a_net_is_trained_with_them():
    text = torch.arange(7)[None]
    assert with_landmarks(text, 99, 4).tolist() == [[0, 1, 2, 99, 3, 4, 5, 99, 6]]
    assert is_landmark(9, 4).tolist() == [i in (3, 7) for i in range(9)]
    net = LanguageModel(33, mixer="landmark:block_tokens=4", channels=16, layers=2).double()
    ids = with_landmarks(torch.arange(20)[None] * 7 % 32, 32, 4)
    asked = ~is_landmark(ids.shape[1], 4)[1:]
    logits = net(ids)[0][0, :-1][asked]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:][asked]).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in net.parameters())


def test_options_that_make_no_sense_are_refused():
    said = r"landmark\.block_tokens=1: a block has a token and its landmark\. Give at least 2\."
    with pytest.raises(BadOption, match=said):
        layer(block_tokens=1)
    said = r"landmark\.read_blocks=2: only texts in which no token sees a later one are read in part\. Leave it"
    with pytest.raises(BadOption, match=said):
        layer(False, read_blocks=2)
