"""HaloNet: blocks and halos by plain loops, relative positions, strides and borders, and the nets H0 to H7."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saccade.core.errors import BadInput, BadOption, CannotRun, UnknownName
from saccade.core.method import Slot
from saccade.methods.mixers._halo import Halo, halo_attention
from saccade.methods.mixers.halonet import HaloNet
from saccade.methods.nets import HaloNets, VisionModel
from saccade.methods.nets._halonet import SIZES, Size
from saccade.ops.attend import fused
from tests.mixers import assert_as_good, made, noise

SIZE = 4  # of a head


def by_loops(q, k, v, tables, halo: Halo):
    """One head: window by window, cell by cell, with true offsets."""
    (height, width), w = halo.sides, halo.window
    out = []
    for y, x in itertools.product(range(0, height, halo.stride), range(0, width, halo.stride)):
        query = q[len(out)]
        top, left = y // halo.block * halo.block, x // halo.block * halo.block
        logits, values = [], []
        for row, col in itertools.product(range(top - halo.halo, top + halo.block + halo.halo),
                                          range(left - halo.halo, left + halo.block + halo.halo)):  # fmt: skip
            inside = 0 <= row < height and 0 <= col < width
            if not inside and halo.mask_pad:
                continue
            # the tables begin at the farthest offset behind: w - 1, less the halo between window and block
            said = query @ tables[0][row - y + halo.halo + w - 1] + query @ tables[1][col - x + halo.halo + w - 1]
            cell = row * width + col
            logits.append(said + query @ k[cell] / math.sqrt(SIZE) if inside else said)
            values.append(v[cell] if inside else torch.zeros_like(v[0]))
        out.append(torch.stack(logits).softmax(0) @ torch.stack(values))
    return torch.stack(out)


def inputs(halo: Halo):
    cells, queries = math.prod(halo.sides), math.prod(halo.out_sides)
    given = [noise(1, 2, queries, SIZE), noise(1, 2, cells, SIZE).roll(1, 2), noise(1, 2, cells, 6)]
    tables = [noise(2 * halo.window - 1, SIZE), noise(2 * halo.window - 1, SIZE).flip(0)]
    return [x.requires_grad_() for x in (*given, *tables)]


@st.composite
def halos(draw) -> Halo:
    sides = draw(st.tuples(st.integers(1, 6), st.integers(1, 5)))
    stride = draw(st.sampled_from([1, 1, 2]))
    return Halo(sides, stride * draw(st.integers(1, 3)), draw(st.integers(0, 2)), stride, draw(st.booleans()))


@settings(max_examples=12, deadline=None, phases=[Phase.generate])
@given(halo=halos())
def test_values_and_gradients_are_those_of_the_loops(halo):
    """Tables too; sides that are no whole blocks, strides, zeros beyond the border or nothing."""
    q, k, v, *tables = given = inputs(halo)
    ours = halo_attention(q, k, v, tables, halo)
    wanted = torch.stack([by_loops(q[0, h], k[0, h], v[0, h], tables, halo) for h in range(2)])[None]
    weights, found = noise(*ours.shape), []
    for out in (ours, wanted):
        grads = torch.autograd.grad((out * weights).sum(), given)
        found.append(torch.cat([x.flatten() for x in (out, *grads)]))  # together: some are zero but for rounding
    assert_as_good(*found, str(halo))


def test_a_stride_leaves_out_queries_and_nothing_else():
    whole, half = Halo((8, 6), 4, 1), Halo((8, 6), 4, 1, stride=2)
    q, k, v, *tables = inputs(whole)
    every = halo_attention(q, k, v, tables, whole).unflatten(2, (8, 6))[:, :, ::2, ::2].flatten(2, 3)
    some = q.unflatten(2, (8, 6))[:, :, ::2, ::2].flatten(2, 3)
    assert_as_good(halo_attention(some, k, v, tables, half), every, "stride")


def test_moving_a_picture_by_whole_blocks_moves_what_comes_out():
    halo = Halo((12, 12), 3, 2)
    q, k, v, *tables = inputs(halo)
    moved = [x.unflatten(2, (12, 12)).roll((3, 3), (2, 3)).flatten(2, 3) for x in (q, k, v)]
    ours, theirs = (halo_attention(*x, tables, halo).unflatten(2, (12, 12)) for x in (moved, (q, k, v)))
    assert_as_good(ours[:, :, 6:9, 6:9], theirs[:, :, 3:6, 3:6], "moved")


def test_long_maps_go_the_tiled_way(monkeypatch):
    monkeypatch.setattr(fused, "FEW_PAIRS", 0)
    halo = Halo((7, 5), 3, 1)
    q, k, v, *tables = inputs(halo)
    wanted = by_loops(q[0, 0], k[0, 0], v[0, 0], tables, halo)
    assert_as_good(halo_attention(q, k, v, tables, halo)[0, 0], wanted, "long")


def test_a_block_without_a_halo_is_a_window_and_blocks_of_one_have_their_own():
    layer = HaloNet(Slot(16, 4, causal=False, grid=(4, 4)), block=2, halo=0).double()
    x = noise(1, 16, 16).requires_grad_()
    layer.out = torch.nn.Identity()
    seen = torch.autograd.grad(layer(x)[0][0, 5].sum(), x)[0][0].any(-1).nonzero()[:, 0].tolist()
    assert seen == [0, 1, 4, 5]
    layer = HaloNet(Slot(16, 4, causal=False, grid=(4, 4)), block=1, halo=1).double()
    layer.out = torch.nn.Identity()
    seen = torch.autograd.grad(layer(x)[0][0, 5].sum(), x)[0][0].any(-1).nonzero()[:, 0].tolist()
    assert seen == [0, 1, 2, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("options", [{}, {"block": 3, "halo": 1}, {"block": 2, "halo": 2, "scale_positions": True},
                                     {"block": 4, "halo": 1, "mask_pad": False}], ids=str)  # fmt: skip
def test_the_layer_in_pictures_and_lines(options):
    layer = HaloNet(Slot(16, 4, causal=False, grid=(5, 6)), **options).double()
    x = noise(2, 30, 16)
    assert_as_good(layer(x)[0], layer.reference(x), "picture")
    line = made(lambda slot: HaloNet(slot, **options), causal=False)
    assert_as_good(line(x[:, :17])[0], line.reference(x[:, :17]), "line")


def test_it_is_trained_in_the_small_net_of_pictures():
    net = VisionModel(3, (1, 8, 8), mixer="halonet:block=2,halo=1", channels=16, layers=1).double()
    net(noise(2, 1, 8, 8)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# of the paper's table, in millions
PARAMETERS = {"h0": 5.5, "h3": 11.8, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}
LAYERS = {"h0": 50, "h1": 59, "h2": 62, "h3": 65, "h4": 65, "h5": 98, "h6": 101, "h7": 107}


@pytest.mark.parametrize("size", SIZES)
def test_the_nets_have_the_papers_parameters(size):
    with torch.device("meta"):
        net = HaloNets(size)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert abs(millions - PARAMETERS.get(size, millions)) < 0.1
    assert sum(net.size.depths) * 3 + 2 == LAYERS[size]


def test_a_small_net_learns_with_every_weight_and_takes_any_picture():
    net = HaloNets(Size(32, 2, 1, 2.0, 1.5, (1, 1, 1, 1), 32), classes=5)
    net(noise(2, 3, 46, 38, dtype=torch.float32)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_what_does_not_fit_is_said():
    with pytest.raises(BadOption, match="blocks of 0 cells with a halo of 1 and a stride of 1: the halo may be 0"):
        Halo((4, 4), 0, 1)
    with pytest.raises(BadOption, match="a stride of 2: queries of a block would not be evenly apart"):
        Halo((4, 4), 3, 1, 2)
    with pytest.raises(BadOption, match="zeros behind a text would come before its later tokens"):
        HaloNet(Slot(16, 4), mask_pad=False)
    with pytest.raises(CannotRun, match="halonet in a causal net of pictures: a picture has no order"):
        HaloNet(Slot(16, 4, grid=(2, 2)))
    with pytest.raises(BadInput, match=r"halonet of 5 tokens: the grid is \(2, 3\)"):
        HaloNet(Slot(16, 4, causal=False, grid=(2, 3)))(noise(1, 5, 16))
    with pytest.raises(UnknownName, match="no HaloNet 'h9'"):
        HaloNets("h9")
