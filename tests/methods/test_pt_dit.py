"""PT-DiT: the block against itself written out by coordinates; what is left in the limits; what is refused."""

from __future__ import annotations

import pytest
import torch

from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.methods.nets.pt_dit import PtDit, norm
from tests.mixers import assert_as_good, made, noise

FORMS = [{}, {"proxy_layout": "ref"}, {"extraction": "first"}, {"shifted": False}, {"proxy_side": 4}]


def layer(grid=(4, 8), started=True, **options):
    """Its Z away from zero, if it is `started`."""
    mixer = made(lambda slot: PtDit(slot, **options), causal=False, grid=grid)
    if started:
        for z in filter(None, (mixer.spread, mixer.detail)):
            z.weight.data, z.bias.data = noise(*z.weight.shape) / 4, noise(*z.bias.shape)
    return mixer


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_is_the_block_written_out_and_its_gradients(form):
    mixer, x = layer(**form), noise(2, 32, 16).requires_grad_()
    found = []
    for y in (mixer(x)[0], mixer.reference(x)):
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    for ours, theirs in zip(*found):
        assert_as_good(ours, theirs, str(form))


def test_at_first_it_is_attention_in_windows():
    mixer, x = layer(started=False), noise(1, 32, 16)
    h = norm(x)
    halves = torch.arange(32).view(4, 8).split(4, 1)
    wanted = torch.zeros_like(x)
    for some in halves:
        at = some.flatten().tolist()
        wanted[:, at] = mixer.attention["windows"].slow(h[:, at], h[:, at], [list(range(16))] * 16)
    assert_as_good(mixer(x)[0], wanted, "windows")


def test_proxies_of_one_token_and_a_window_of_the_picture_are_dense_attention():
    mixer, x = layer((4, 4), proxy_side=1, shifted=False), noise(1, 16, 16)
    every = [list(range(16))] * 16
    a = x + mixer.attention["proxies"].slow(norm(x), norm(x), every)
    new = x + mixer.spread(mixer.attention["cross"].slow(norm(x), norm(a), every))
    new = new + mixer.attention["windows"].slow(norm(new), norm(new), every)
    assert_as_good(mixer(x)[0], new - x, "dense")


def test_shifted_windows_are_the_mask_of_a_rolled_picture():
    """Labels of three slices on each axis, as Swin has them."""
    mixer, rows, columns, c, s = layer((8, 12)), 8, 12, 4, 2
    label, mask = torch.zeros(rows, columns, dtype=torch.long), torch.zeros(96, 96, dtype=torch.bool)
    slices = [slice(0, -c), slice(-c, -s), slice(-s, None)]
    for i, (one, other) in enumerate((a, b) for a in slices for b in slices):
        label[one, other] = i
    place = torch.arange(96).view(rows, columns).roll((-s, -s), (0, 1))
    for y in range(0, rows, c):
        for x in range(0, columns, c):
            at, of = (t[y : y + c, x : x + c].flatten() for t in (place, label))
            mask[at[:, None], at] = of[:, None] == of
    assert torch.equal(mixer.windows(s, torch.device("cpu")).mask()[0, 0], mask)


def test_rolling_by_a_window_rolls_the_output_where_nothing_is_shifted():
    mixer, x = layer(shifted=False), noise(1, 32, 16)
    rolled = [t.view(1, 4, 8, 16).roll(4, 2).flatten(1, 2) for t in (x, mixer(x)[0])]
    assert_as_good(mixer(rolled[0])[0], rolled[1], "rolled")


def test_modulations_shift_scale_and_gate_each_picture():
    mixer, x = layer(shifted=False), noise(2, 32, 16)
    m = noise(2, 6, 16)
    new = x + mixer.spread(mixer.attention["cross"](norm(x), norm(mixer._proxies(x))))
    h = norm(new) * (1 + m[:, 1:2]) + m[:, :1]
    wanted = new + m[:, 2:3] * mixer.attention["windows"].slow(h, h, mixer._seen(0))
    assert_as_good(mixer(x, modulation=m)[0], wanted - x, "modulated")
    alone = mixer(x[1:], modulation=m[1:])[0]
    assert_as_good(mixer(x, modulation=m)[0][1:], alone, "the second picture")
    both, closed = layer(), m.clone()
    closed[:, 2::3] = 0
    far = both.spread(both.attention["cross"](norm(x), norm(both._proxies(x))))
    assert_as_good(both(x, modulation=closed)[0], far + both.detail.bias, "closed gates")


def test_what_cannot_be():
    for options, text in (
        ({"proxy_side": 3}, r"pt-dit\.window_side=4 with proxy_side=3: cells tile a window only"),
        ({"window_side": 0, "proxy_side": 0}, r"pt-dit\.window_side=0 with proxy_side=0"),
        ({"extraction": "random"}, r"pt-dit\.extraction='random': it takes 'mean' or 'first'"),
        ({"proxy_layout": "row"}, r"pt-dit\.proxy_layout='row': it takes 'cell' or 'ref'"),
    ):
        with pytest.raises(BadOption, match=text):
            layer(**options)
    for slot, text in (
        ({"grid": (4, 6), "causal": False}, "6 rows or columns have no whole windows of 4"),
        ({"grid": (4, 4), "causal": True}, "no token would see a later one"),
        ({"grid": None, "causal": False}, "the tokens are no picture's"),
    ):
        with pytest.raises(CannotRun, match=text):
            made(PtDit, **slot)
    with pytest.raises(CannotRun, match="read a picture in pieces: every token sees all others"):
        layer()(noise(1, 16, 16))
    with pytest.raises(BadInput, match=r"modulations of 1 pictures of 16 channels: they are \(1, 3, 16\)"):
        layer()(noise(1, 32, 16), modulation=noise(1, 3, 16))
