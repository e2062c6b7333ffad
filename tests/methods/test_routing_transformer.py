"""Routing by plain loops: who is in a cluster, what it sees, how centroids learn, and what depends on later tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import BadOption
from saccade.core.selection import causal_mask
from saccade.measure.training.loop import density
from saccade.methods.mixers.routing_transformer import SMOOTHING
from saccade.methods.nets import LanguageModel
from tests.mixers import assert_as_good, made, noise

NAME = "routing-transformer"
SIZES = st.fixed_dictionaries(
    {"clusters": st.integers(1, 6), "window_tokens": st.integers(0, 12), "local_heads": st.integers(0, 4)}
)


def layer(causal=True, **options):
    given_ = ",".join(f"{name}={value}" for name, value in options.items())
    return made(f"{NAME}:{given_}" if options else NAME, causal=causal)


def normed(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 14), size=SIZES, how=st.sampled_from(["best", "strict", "both ways"]))
def test_every_size_is_what_loops_compute(n, size, how):
    mixer = layer(how != "both ways", strict_causal=how == "strict", **size)
    x = noise(1, n, 16).requires_grad_()
    ours, theirs = mixer(x)[0], mixer.reference(x)
    assert_as_good(ours, theirs, how)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    assert_as_good(*grads, "gradient")


def test_one_cluster_of_all_tokens_is_dense_attention_of_queries_over_themselves():
    mixer, x = layer(clusters=1, window_tokens=99, local_heads=0), noise(2, 11, 16)
    mixer.out, v = torch.nn.Identity(), (x @ mixer.qkv.weight[16:].T).unflatten(-1, (4, 4)).transpose(1, 2)
    q = normed((x @ mixer.qkv.weight[:16].T).unflatten(-1, (4, 4)).transpose(1, 2))
    at = torch.arange(11)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
    cos, sin = torch.cos(at), torch.sin(at)
    first, second = q.chunk(2, -1)
    q = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    logits = (q @ q.mT / math.sqrt(4)).masked_fill(~causal_mask(11, 11), -torch.inf)
    assert_as_good(mixer(x)[0], (logits.softmax(-1) @ v).transpose(1, 2).flatten(2), "dense")
    assert mixer.density() == 1


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 15), min_size=1, max_size=4, unique=True).map(sorted), window=st.integers(1, 9))
def test_strictly_causal_layers_read_in_pieces_and_see_nothing_later(cuts, window):
    mixer, x = layer(strict_causal=True, window_tokens=window, clusters=3), noise(2, 16, 16)
    whole, state, parts = mixer(x)[0], {}, []
    for start, end in zip([0, *cuts], [*cuts, 16]):
        part, state = mixer(x[:, start:end], state)
        parts.append(part)
    assert_as_good(torch.cat(parts, 1), whole, "pieces")
    other = torch.cat([x[:, : cuts[0]], -x[:, cuts[0] :]], 1)
    assert_as_good(mixer(other)[0][:, : cuts[0]], whole[:, : cuts[0]], "causality")


@torch.no_grad()
@pytest.mark.parametrize("how", ["best", "strict", "both ways"])
def test_density_counts_what_the_loops_see(how):
    mixer, x, n = layer(how != "both ways", strict_causal=how == "strict", window_tokens=5), noise(1, 17, 16), 17
    mixer(x)
    q, k, _ = mixer._heads(x, None)
    pairs = sum(len(seen) for h in range(4) for _, seen in mixer._seen(q[0, h], k[0, h], h - mixer.local))
    dense = n * n if how == "both ways" else n * (n + 1) // 2
    assert mixer.density() == pytest.approx(pairs / (4 * dense))


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_without_memory_a_backward_pass_is_a_step_of_lloyd(causal):
    """To the means of the nearest points, those of padding left out; queries and keys together where they differ."""
    mixer, x, lengths = layer(causal, decay=0.0, clusters=2), noise(2, 9, 16), torch.tensor([9, 4])
    mixer.eval()
    q, k, _ = mixer._heads(x, None)
    points = [torch.cat([y[0, 2:], y[1, 2:, :4]], 1) for y in ((q,) if causal else (q, k))]
    points, before = torch.cat(points, 1), mixer.centroids()
    mixer(x, lengths=lengths)[0].sum().backward()
    assert torch.equal(mixer.centroids(), before), "it learnt though it is not in training"
    y = mixer.train()(x, lengths=lengths)[0]
    assert torch.equal(mixer.centroids(), before), "it learnt in a forward pass"
    y.sum().backward()
    for head in range(2):
        own = (points[head] @ before[head].T).argmax(-1)
        sums = torch.stack([points[head][own == c].sum(0) for c in range(2)])
        counts = torch.stack([(own == c).sum() for c in range(2)]).double()
        smooth = (counts + SMOOTHING) / (counts.sum() + 2 * SMOOTHING) * counts.sum()
        assert_as_good(mixer.centroids()[head], normed(sums / smooth[:, None]), "means")


def test_the_commitment_is_the_gradient_of_its_loss():
    mixer, x = layer(commitment=0.5, clusters=3), noise(2, 9, 16)
    plain = layer(commitment=0.0, clusters=3)
    for one in (mixer, plain):
        one(x)[0].square().sum().backward()
    fresh = layer(clusters=3).eval()
    points, mu = fresh._heads(x, None)[0][:, 2:], fresh.centroids()
    nearest = (points @ mu.mT).argmax(-1)
    target = torch.stack([mu[h][nearest[:, h]] for h in range(2)], 1)
    loss = 0.5 * (points - target).square().sum(-1).mean()
    loss.backward()
    assert_as_good(mixer.qkv.weight.grad - plain.qkv.weight.grad, fresh.qkv.weight.grad, "commitment")


def test_a_net_learns_with_it_and_its_centroids_move():
    net = LanguageModel(32, mixer=NAME, channels=16, layers=2).double()
    ids, before = torch.arange(40)[None] * 7 % 32, [block.mixer.centroids() for block in net.blocks]
    optimiser, losses = torch.optim.Adam(net.parameters(), lr=0.01), []
    for _ in range(8):
        losses.append(torch.nn.functional.cross_entropy(net(ids)[0][0, :-1], ids[0, 1:]))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0] and 0 < density(net) < 1
    assert all(not torch.equal(old, block.mixer.centroids()) for old, block in zip(before, net.blocks))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clusters": 0}, r"routing-transformer\.clusters=0: it takes at least 1\. Give a number of centroids\."),
        ({"local_heads": 5}, r"routing-transformer\.local_heads=5: the layer has 4 heads\. Give as many at most\."),
        ({"causal": False, "strict_causal": True}, r"strict_causal=True: tokens see later ones in this net\. Leave"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(BadOption, match=said):
        layer(**options)
