"""BiFormer: routing and attention by plain loops, borders, what is dense, and the nets of the paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saccade.core.errors import BadInput, BadOption, CannotRun, UnknownName
from saccade.core.method import Slot
from saccade.methods.mixers.biformer import BiFormer
from saccade.methods.nets import BiFormers, VisionModel
from saccade.methods.nets._biformer import SIZES, Size
from saccade.ops.attend import fused
from saccade.ops.attend.reference import masked
from tests.mixers import assert_as_good, made, noise


def layer(grid, dtype=torch.float64, **options) -> BiFormer:
    return made(lambda slot: BiFormer(slot, **options), dtype, causal=False, grid=grid)


@settings(max_examples=12, deadline=None, phases=[Phase.generate])
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 5)), side=st.integers(1, 3), topk=st.integers(1, 5),
    lepe=st.sampled_from([0, 3, 5]), qk_scale=st.sampled_from(["channels", "head"]),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_loops(grid, side, topk, lepe, qk_scale):
    """Regions that are cut at the border too."""
    mixer = layer(grid, side=side, topk=topk, lepe=lepe, qk_scale=qk_scale)
    x = noise(2, grid[0] * grid[1], 16).requires_grad_()
    weights, found = noise(*x.shape), []
    for y in (mixer(x)[0], mixer.reference(x)):
        grads = torch.autograd.grad((y * weights).sum(), [x, *mixer.parameters()])
        found.append(torch.cat([part.flatten() for part in (y, *grads)]))
    assert_as_good(*found, str(grid))


@pytest.mark.parametrize("options", [{}, {"side": 3, "topk": 1}, {"side": 2, "topk": 2, "lepe": 0}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_lines_are_those_of_the_loops(options, causal):
    mixer = made(lambda slot: BiFormer(slot, **options), causal=causal)
    x = noise(2, 17, 16)
    assert_as_good(mixer(x)[0], mixer.reference(x), str(options))


def test_all_regions_are_dense_attention_and_a_convolution():
    """With the published scale."""
    mixer, x = layer((4, 6), topk=6), noise(1, 24, 16)
    q, k, v = mixer._heads(x)
    dense = masked(q, k, v, None, scale=16**-0.5)[0]
    image = v.transpose(2, 3).reshape(1, 16, 4, 6)
    local = torch.nn.functional.conv2d(image, mixer.lepe.weight, mixer.lepe.bias, padding=2, groups=16)
    wanted = dense.transpose(1, 2).reshape(1, 24, 16) + local.flatten(2).mT
    assert_as_good(mixer(x)[0], mixer.out(wanted), "dense")


def test_a_region_goes_where_its_mean_query_points():
    """Queries of one region along the keys of another: that one is chosen first, for all of its tokens."""
    mixer = layer((4, 4), topk=1, lepe=0)
    q, k = torch.zeros(1, 16, 16, dtype=torch.float64), torch.zeros(1, 16, 16, dtype=torch.float64)
    regions = mixer._regions(16)
    assert regions.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    for here, there in enumerate([2, 0, 3, 1]):
        q[0, regions[here], here], k[0, regions[there], here] = 1.0, 1.0
    heads = [x.view(1, 16, 4, 4).transpose(1, 2) for x in (q, k, noise(1, 16, 16))]
    y = mixer._attend(*heads).transpose(1, 2).flatten(2)
    for here, there in enumerate([2, 0, 3, 1]):
        assert_as_good(y[0, regions[here][0]], y[0, regions[here][3]], "one list for a region")
        logits = q[0, regions[here][0]].view(4, 4)[None] * k[0, regions[there]].view(4, 4, 4) / 4
        weights = logits.sum(-1).softmax(0)
        values = noise(1, 16, 16)[0, regions[there]].view(4, 4, 4)
        assert_as_good(y[0, regions[here][0]], (weights[..., None] * values).sum(0).flatten(), "values of the other")


def test_routing_has_no_gradient():
    """Queries learn by the softmax alone: over one key there is nothing to learn, but for rounding."""
    mixer = layer((2, 3), side=1, topk=1, lepe=0)
    mixer(noise(1, 6, 16))[0].square().sum().backward()
    routing, values = mixer.qkv.weight.grad[:32].abs().max(), mixer.qkv.weight.grad[32:].abs().max()
    assert routing <= torch.finfo(values.dtype).eps * values and values


def test_it_goes_the_tiled_way(monkeypatch):
    monkeypatch.setattr(fused, "FEW_PAIRS", 0)
    mixer, x = layer((5, 6)), noise(2, 30, 16)
    assert_as_good(mixer(x)[0], mixer.reference(x), "tiled")


def test_it_is_trained_in_the_small_net_of_pictures():
    net = VisionModel(3, (1, 8, 8), mixer="biformer", channels=16, layers=1).double()
    net(noise(2, 1, 8, 8)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("size", "millions"), [("t", 13.1), ("s", 25.5), ("b", 56.8), ("stl", 28.4)])
def test_the_nets_have_the_papers_parameters(size, millions):
    with torch.device("meta"):
        net = BiFormers(size)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
    sides = [block.mixer.side for stage in net.stages[:3] for block in stage[:1]]
    assert sides == [8, 4, 2] and SIZES[size].topk[3] == 0


@pytest.mark.parametrize("swin", [False, True])
def test_a_small_net_learns_with_every_weight(swin):
    small = Size(16, (1, 1, 1, 1), (1, 2, 2, 0), regions=2, head=8, swin=swin)
    net = BiFormers(small, classes=5, image=40, drop_path=0.5)
    images = noise(4, 3, 40, 40, dtype=torch.float32)
    net(images).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(net.eval()(images), net(images)), "nothing is drawn but in training"


def test_what_does_not_fit_is_said():
    with pytest.raises(BadOption, match="biformer of side=0, topk=4: both must be 1 or more"):
        BiFormer(Slot(16, 4), side=0)
    with pytest.raises(BadOption, match=r"biformer\.lepe=4: a convolution has an odd width"):
        BiFormer(Slot(16, 4), lepe=4)
    with pytest.raises(BadInput, match=r"biformer of 5 tokens: the grid is \(2, 3\)"):
        layer((2, 3))(noise(1, 5, 16))
    with pytest.raises(CannotRun, match="biformer in a causal net of pictures: a picture has no order"):
        BiFormer(Slot(16, 4, grid=(2, 2)))
    with pytest.raises(UnknownName, match="no BiFormer 'x'"):
        BiFormers("x")
