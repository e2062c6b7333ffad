"""Neighborhood attention: the window rule of the paper by plain loops, in one to three axes, and its three forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.method import Slot
from saccade.methods.mixers._windows import Axis, Windows
from saccade.methods.mixers.faster_neighborhood import FasterNeighborhood, neighborhood_attention
from saccade.methods.nets import VisionModel
from saccade.ops.attend.reference import masked
from tests.mixers import assert_as_good, made, noise

FORMS = ("fused", "unfused", "naive")


def seen(axis: Axis, cell: int) -> list[int]:
    """Keys of a cell, as the paper says it: a window around a leader, moved inwards by what it sticks out."""
    rest, i = cell % axis.dilation, cell // axis.dilation
    n = len(range(rest, axis.cells, axis.dilation))
    k, s = axis.kernel, axis.stride
    if axis.causal:
        leader = min(i // s * s + s - 1, n - 1)
        keys = [j for j in range(max(leader - k + 1, 0), n) if j <= i]
    else:
        leader = min(i // s * s + s // 2, n - 1)
        left, right = k // 2, k // 2 + k % 2 - 1
        start = max(leader - left, 0) + (n - right - leader - 1 if leader + right >= n else 0)
        keys = list(range(start, start + k))
    return [j * axis.dilation + rest for j in keys]


def mask(windows: Windows) -> torch.Tensor:
    """All pairs, cell by cell."""
    sizes = [axis.cells for axis in windows.axes]
    cells = list(itertools.product(*map(range, sizes)))
    out = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for row, cell in enumerate(cells):
        for key in itertools.product(*[seen(axis, c) for axis, c in zip(windows.axes, cell)]):
            out[row, cells.index(key)] = True
    return out


@st.composite
def axes(draw, most: int) -> Axis:
    cells, causal = draw(st.integers(1, most)), draw(st.booleans())
    dilation = draw(st.integers(1, min(3, cells)))
    kernel = draw(st.integers(1, cells // dilation))
    return Axis(cells, kernel, dilation, draw(st.integers(1, kernel)), causal)


@st.composite
def windows(draw) -> Windows:
    count = draw(st.integers(1, 3))
    return Windows(tuple(draw(axes({1: 20, 2: 7, 3: 4}[count])) for _ in range(count)))


@given(axis=axes(30))
def test_an_axis_is_the_papers_rule(axis):
    keys = axis.keys()
    for cell in range(axis.cells):
        mine = [j for j in keys[cell].tolist() if j >= 0]
        assert mine == seen(axis, cell) and cell in mine
        assert axis.causal or len(mine) == axis.kernel


@settings(max_examples=25, deadline=None)
@given(where=windows())
def test_every_form_is_dense_attention_under_the_mask(where):
    inputs = [noise(1, 2, where.cells, 4).roll(i, 2).requires_grad_() for i in range(3)]
    weights = noise(1, 2, where.cells, 4)

    def told(out, lse):
        grads = torch.autograd.grad((out * weights).sum() + lse.sum(), inputs)
        return [out, lse, *grads]

    exact = told(*masked(*inputs, mask(where), scale=0.5))
    for form in FORMS:
        for ours, wanted in zip(told(*neighborhood_attention(*inputs, where, form)), exact):
            assert_as_good(ours, wanted, form)


@given(axis=axes(30))
def test_a_dilation_is_as_many_undilated_neighbourhoods(axis):
    for rest in range(axis.dilation):
        mine = range(rest, axis.cells, axis.dilation)
        inner = Axis(len(mine), axis.kernel, 1, axis.stride, axis.causal).keys()
        assert torch.equal(axis.keys()[rest :: axis.dilation], torch.where(inner < 0, -1, inner * axis.dilation + rest))


@given(blocks=st.integers(1, 5), kernel=st.integers(1, 6))
def test_a_stride_of_the_kernel_is_blocks(blocks, kernel):
    keys = Axis(blocks * kernel, kernel, stride=kernel).keys()
    assert torch.equal(keys, torch.arange(blocks * kernel).view(blocks, kernel).repeat_interleave(kernel, 0))


@given(block=st.integers(1, 4), halo=st.integers(0, 3), blocks=st.integers(3, 6))
def test_away_from_the_border_it_is_a_block_with_a_halo(block, halo, blocks):
    wide = block + 2 * halo
    if wide > block * blocks:
        return
    keys = Axis(block * blocks, wide, stride=block).keys()
    for i in range(block * blocks):
        first = i // block * block - halo
        if first >= 0 and first + wide <= block * blocks:
            assert keys[i].tolist() == list(range(first, first + wide))


LONG = {
    "shared windows": (Axis(600, 9, stride=4),),
    "plane": (Axis(24, 5), Axis(26, 4)),
    "causal": (Axis(600, 7, 2, 1, True),),
    "mixed space": (Axis(8, 3), Axis(9, 2, 3), Axis(10, 4, 1, 2, True)),
}


@pytest.mark.parametrize("name", LONG)
def test_long_inputs_go_the_tiled_way(name):
    """Above the length up to which a processor computes all pairs."""
    where = Windows(LONG[name])
    q, k, v = (noise(1, 1, where.cells, 8).roll(i, 2) for i in range(3))
    exact, _ = neighborhood_attention(q, k, v, where, "naive")
    for form in ("fused", "unfused"):
        assert_as_good(neighborhood_attention(q, k, v, where, form)[0], exact, form)


def test_a_window_of_everything_is_dense():
    where = Windows((Axis(4, 4), Axis(5, 5)))
    q, k, v = (noise(1, 2, 20, 4).roll(i, 2) for i in range(3))
    assert_as_good(neighborhood_attention(q, k, v, where)[0], masked(q, k, v, None, scale=0.5)[0], "dense")


@pytest.mark.parametrize("options", [{"kernel": 3}, {"kernel": 4, "stride": 3}, {"kernel": 2, "dilation": 3}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_layer_in_pictures_and_in_pieces(options, form):
    picture = FasterNeighborhood(Slot(16, 4, causal=False, grid=(6, 7)), form=form, **options).double()
    x = noise(2, 42, 16)
    assert_as_good(picture(x)[0], picture.reference(x), "picture")
    text = made(lambda slot: FasterNeighborhood(slot, form=form, **options))
    whole, _ = text(x[:, :17])
    assert_as_good(whole, text.reference(x[:, :17]), "text")
    first, state = text(x[:, :5])
    last, _ = text(x[:, 5:17], state)
    assert_as_good(torch.cat([first, last], 1), whole, "pieces")


def test_it_is_trained_in_the_small_net_of_pictures():
    net = VisionModel(3, (1, 8, 8), mixer="faster-neighborhood:kernel=3", channels=16, layers=1).double()
    net(noise(2, 1, 8, 8)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_what_does_not_fit_is_said():
    with pytest.raises(BadOption, match="windows of 7 cells, dilation 2, stride 1, over 9: they reach over 14 cells"):
        Axis(9, 7, 2)
    with pytest.raises(BadOption, match="all of these must be 1 or more"):
        Axis(9, 0)
    with pytest.raises(BadOption, match="queries between two windows would not see themselves"):
        Axis(9, 3, stride=4)
    with pytest.raises(BadOption, match="over 4: they reach over 9 cells"):
        VisionModel(3, (1, 8, 8), mixer="faster-neighborhood:kernel=9", channels=16)
    with pytest.raises(BadInput, match="for 5 queries and 5 keys: the grid has 6 cells"):
        neighborhood_attention(*[noise(1, 1, 5, 4)] * 3, Windows((Axis(2, 1), Axis(3, 1))))
    with pytest.raises(CannotRun, match="in a causal net of pictures: a picture has no order"):
        FasterNeighborhood(Slot(16, 4, grid=(2, 2)))
    with pytest.raises(BadInput, match="for 5 queries and 5 keys: the grid has 6 cells"):
        FasterNeighborhood(Slot(16, 4, causal=False, grid=(2, 3)), kernel=2)(noise(1, 5, 16, dtype=torch.float32))
    with pytest.raises(CannotRun, match="heads of 2 channels cannot be turned in pairs; give a multiple of 4"):
        FasterNeighborhood(Slot(8, 4, causal=False, grid=(8, 8)))
