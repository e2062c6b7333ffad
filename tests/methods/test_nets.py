"""The two small nets: whatever mixes, the rest is the same; and what cannot stand in the slot says why."""

from __future__ import annotations

import pytest
import torch

from saccade.core.budget import Budget
from saccade.core.errors import BadInput, BadOption, CannotRun, UnknownName
from saccade.core.method import Mixer, Slot, made, options, place
from saccade.core.registry import get
from saccade.methods.nets import LanguageModel, VisionModel, make_mixer
from tests.mixers import Fading, assert_as_good, noise

SMALL = {"channels": 16, "heads": 4, "layers": 2}
IDS = torch.randint(0, 32, (2, 11), generator=torch.Generator().manual_seed(3))


def language(mixer, **more) -> LanguageModel:
    return LanguageModel(32, mixer=mixer, **{**SMALL, "budget": "4tok", **more}).double()


@pytest.mark.parametrize("mixer", ["full", "streaming", Fading], ids=["full", "streaming", "fading"])
def test_a_language_model_reads_at_once_in_pieces_and_by_steps(mixer):
    net = language(mixer)
    whole, _ = net(IDS)
    first, state = net(IDS[:, :5])
    second, state = net(IDS[:, 5:10], state)
    last, _ = net.step(IDS[:, 10], state)
    assert_as_good(torch.cat([first, second, last[:, None]], 1), whole, str(mixer))
    padded, _ = net(IDS, lengths=torch.tensor([11, 6]))
    assert_as_good(padded[1, :6], net(IDS[1:, :6])[0][0], "a padded row")


@pytest.mark.parametrize("mixer", ["full", "random", "streaming", "hip", "oracle-topk"])
def test_every_weight_learns_under_a_selection(mixer):
    """Of both nets; `random` keeps within its budget, and the selection is the method's own."""
    nets = {"language": (language(mixer, budget=0.5), IDS)}
    picture = VisionModel(3, (1, 8, 8), mixer=mixer, budget=0.5, **SMALL).double()
    nets["vision"] = (picture, noise(2, 1, 8, 8))
    for kind, (net, given) in nets.items():
        out = net(given)
        (out[0] if kind == "language" else out).logsumexp(-1).sum().backward()
        still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not still
        chosen = net.blocks[0].mixer.last
        if mixer == "random":
            assert float(chosen.density().max()) <= 0.5
        assert (mixer == "full") == bool((chosen.density() == 1).all())


def test_pictures_are_read_both_ways_by_what_selects_and_as_a_whole_by_full():
    net = VisionModel(3, (1, 4, 4), patch=1, mixer="streaming", budget="4tok", **SMALL)
    mixer, x = net.blocks[0].mixer.double(), noise(1, 16, 16).requires_grad_()
    mixer.out = torch.nn.Identity()  # heads stay apart
    ahead, behind = (torch.autograd.grad(mixer(x)[0][0, 8, part].sum(), x)[0][0] for part in (slice(8), slice(8, 16)))
    assert not ahead[9:].any() and not behind[:8].any() and ahead[:8].any() and behind[9:].any()
    whole = VisionModel(3, (1, 4, 4), patch=1, **SMALL).double().blocks[0].mixer
    assert torch.autograd.grad(whole(x)[0][0, 8].sum(), x)[0][0].any(-1).all()


def test_another_mixer_leaves_all_other_weights_as_they_are():
    one, two, other = language("full"), language(Fading), language("full", seed=1)
    shared = {n: p for n, p in two.named_parameters() if ".mixer." not in n}
    assert shared and all(torch.equal(p, dict(one.named_parameters())[n]) for n, p in shared.items())
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    state = torch.get_rng_state()
    language("random")
    assert torch.equal(torch.get_rng_state(), state), "making a net moved the user's own stream"


def test_a_slot_takes_names_methods_and_factories():
    slot = Slot(16, 4, budget=Budget.of(0.5))
    assert make_mixer("random:block_tokens=8", slot).method == get("random")(part="prefill", block_tokens=8)
    assert make_mixer(get("streaming")(sink_tokens=1), slot).method.sink_tokens == 1
    assert make_mixer(Fading, slot).slot is slot
    assert options(Fading) == {"decay": 0.5} and place(Fading, slot, {"decay": "0.25"}).decay == 0.25


@pytest.mark.parametrize(
    ("mixer", "error", "words"),
    [
        ("hop", UnknownName, "no method 'hop'.*Did you mean 'hip'"),
        ("streaming:sink=1", BadOption, "option 'sink' of streaming: there is none of that name"),
        ("streaming:sink", BadOption, "'sink' is no option=value"),
        ("knorm", CannotRun, "train 'knorm' in a net: it selects nothing while a text is read, only"),
        ("minference", CannotRun, "train 'minference' in a net: it is calibrated on a pretrained model"),
    ],
)
def test_what_cannot_mix_is_said(mixer, error, words):
    with pytest.raises(error, match=words):
        language(mixer)


def test_shapes_that_do_not_fit_are_said():
    with pytest.raises(BadOption, match="10 channels in 4 heads: the channels are not shared out evenly"):
        Slot(10, 4)
    with pytest.raises(CannotRun, match="heads of 3 channels cannot be turned in pairs; give a multiple of 2"):
        language("full", channels=12)
    with pytest.raises(CannotRun, match="3 heads have no half that could read in reverse"):
        VisionModel(2, (1, 4, 4), mixer="streaming", channels=12, heads=3)
    with pytest.raises(BadInput, match="patches of 3 x 3 of a picture of 8 x 8: they do not tile it"):
        VisionModel(2, (1, 8, 8), patch=3)
    with pytest.raises(CannotRun, match="a step of full: tokens see later ones in this net"):
        make_mixer("full", Slot(16, 4, causal=False)).step(noise(1, 16), {})
    with pytest.raises(BadOption, match="option 'speed' of fading: there is none of that name"):
        place(Fading, Slot(16, 4), {"speed": "1"})
    with pytest.raises(BadOption, match=r"fading\.decay='half': it takes float"):
        place(Fading, Slot(16, 4), {"decay": "half"})


def test_a_layer_is_not_attached(monkeypatch):
    monkeypatch.setattr("saccade.core.method.get", lambda name: Fading)
    said = "use 'fading' in a loaded model: it is a layer that is trained.*Train it: saccade train --mixer fading"
    with pytest.raises(CannotRun, match=said):
        made("fading")


@pytest.mark.parametrize("form", ["forward", "reference"])
def test_a_form_that_is_not_written_is_an_error(form):
    with pytest.raises(NotImplementedError):
        getattr(Mixer(Slot(16, 4)), form)(noise(1, 2, 16))
