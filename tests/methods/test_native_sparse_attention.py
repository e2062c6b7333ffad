"""The three looks by plain loops, what is selected, and that all of it is trained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import BadOption
from saccade.core.selection import causal_mask
from saccade.methods.nets import LanguageModel
from tests.mixers import assert_as_good, made, noise

NAME = "native-sparse-attention"
SIZES = st.sampled_from([(2, 1, 2), (4, 2, 4), (2, 2, 4), (3, 1, 5), (4, 4, 4), (1, 1, 3)])


def layer(causal=True, sizes=(4, 2, 4), **options):
    block, stride, select = sizes
    options = {"block_tokens": block, "stride_tokens": stride, "select_tokens": select, "window_tokens": 3} | options
    return made(f"{NAME}:" + ",".join(f"{name}={value}" for name, value in options.items()), causal=causal)


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 20), sizes=SIZES, heads=st.sampled_from([1, 2, 4]), causal=st.booleans())
def test_every_size_is_what_loops_compute(n, sizes, heads, causal):
    mixer, x = layer(causal, sizes, kv_heads=heads, select_blocks=3), noise(1, n, 16).requires_grad_()
    ours, theirs = mixer(x)[0], mixer.reference(x)
    assert_as_good(ours, theirs, "output")
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    assert_as_good(*grads, "gradient")


@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(1, 21), min_size=1, max_size=4, unique=True).map(sorted))
def test_pieces_are_one_pass(cuts):
    mixer, x = layer(kv_heads=2), noise(2, 22, 16)
    state, found = {}, []
    for start, end in zip([0, *cuts], [*cuts, 22]):
        part, state = mixer(x[:, start:end], state)
        found.append(part)
    assert_as_good(torch.cat(found, 1), mixer(x)[0], "pieces")


def test_the_share_of_a_block_is_that_of_its_pieces():
    """Where blocks are as long as those compressed and follow on one another it is the attention itself."""
    mixer, block = layer(sizes=(4, 4, 4)), torch.arange(3)
    assert torch.equal(mixer._overlap(3, block), 4 * torch.eye(3, dtype=torch.long))
    overlapping = layer(sizes=(4, 2, 4))._overlap(5, block)
    assert overlapping.tolist() == [[4, 0, 0], [2, 2, 0], [0, 4, 0], [0, 2, 2], [0, 0, 4]]


def test_first_own_and_previous_blocks_are_selected_and_one_more_by_its_share():
    mixer, x = layer(select_blocks=4, kv_heads=2), noise(1, 32, 16)
    mixer(x)
    _, selected, near = mixer.last
    mask = selected.mask()[0]
    blocks = mask.unflatten(-1, (8, 4)).any(-1)
    for t in range(32):
        own = t // 4
        assert blocks[:, t, [0, own, max(0, own - 1)]].all()
        assert (blocks[:, t].sum(-1) == min(4, own + 1)).all()
    assert torch.equal(mask[0], mask[1]) and torch.equal(mask[2], mask[3]), "heads of a group select together"
    assert not torch.equal(mask[0], mask[2])
    assert selected.shared == 2 and int(near.mask().sum(-1).max()) == 3


def test_density_counts_all_three_looks():
    mixer = layer()
    assert mixer.density() is None
    mixer(noise(1, 32, 16))
    assert len(mixer.last) == 3
    pairs = [float(s.mask().sum()) / s.mask().shape[1] for s in mixer.last]
    assert pairs[0] == sum(max(0, (t + 1 - 4) // 2 + 1) for t in range(32))
    assert mixer.density() == pytest.approx(sum(pairs) / int(causal_mask(32, 32).sum()))


def test_a_gate_closes_its_look_and_no_look_is_there_in_a_short_text():
    mixer, x = layer(), noise(1, 20, 16)
    with torch.no_grad():
        mixer.gates.weight.zero_()
        mixer.gates.bias.fill_(-1e4)
    assert not mixer(x)[0].any()
    assert mixer(x[:, :3])[0].isfinite().all() and len(mixer.last) == 2


def test_every_weight_learns():
    net = LanguageModel(33, mixer=f"{NAME}:block_tokens=4,stride_tokens=2", channels=16, layers=2).double()
    ids = torch.arange(40)[None] * 7 % 32
    torch.nn.functional.cross_entropy(net(ids)[0][0, :-1], ids[0, 1:]).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sizes": (4, 3, 4)}, r"with blocks of 4 and 4 tokens, one every 3: both must be multiples of the stride\. G"),
        ({"sizes": (4, 0, 4)}, r"with blocks of 4 and 4 tokens, one every 0: both must be multiples of the stride"),
        ({"sizes": (4, 2, 2)}, r"select_tokens=2: blocks of 4 tokens are compressed\. Select blocks that are as long"),
        ({"select_blocks": 2}, r"select_blocks=2: 3 of them are always selected\. Give as many at least\."),
        ({"window_tokens": 0}, r"window_tokens=0: it takes at least 1\. Give the token itself\."),
        ({"kv_heads": 3}, r"kv_heads=3: 4 heads are not shared out evenly\. Give a divisor of them\."),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(BadOption, match=said):
        layer(**options)
