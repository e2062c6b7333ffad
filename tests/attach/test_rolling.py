"""Rolling caches whose rule is numbers: the same keys as by positions, and the device is not asked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.attach import attach, fingerprint
from saccade.attach.compat import CACHE
from saccade.core.artefact import Artefact
from saccade.methods.cache.duo_attention import DuoAttention
from saccade.methods.cache.razor_attention import RazorAttention
from saccade.methods.cache.snapkv import SnapKV
from saccade.methods.cache.streaming import Streaming
from saccade.methods.decode.quest import Quest
from saccade.methods.decode.recycled_attention import RecycledAttention
from saccade.methods.decode.tidaldecode import TidalDecode
from saccade.methods.sparse.full import Full
from tests.methods.handmade import site, tiny, tokens

MODEL = tiny()
RANKED, MARK = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), fingerprint(MODEL)
GATES = Artefact("duo-attention", {"gates": RANKED}, "tiny", MARK)
DUO = DuoAttention(sink_tokens=2, recent_tokens=4, artefact=GATES)
ASK = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "equal")


class Asked(TorchDispatchMode):
    """Notes the operations for whose result the host would wait."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.seen += [name] * (name in ASK or by_mask)
        return func(*args, **(kwargs or {}))


RAZOR = RazorAttention(
    window_tokens=4, artefact=Artefact("razor-attention", dict.fromkeys(("induction", "echo"), RANKED), "tiny", MARK)
)
TIDAL = TidalDecode(dense_layers=0, reselect_layer="none", group="sum")
METHODS = [
    Full(), SnapKV(window_tokens=4), Streaming(), DUO, Quest(page_tokens=2, dense_layers=0), RAZOR, TIDAL,
    RecycledAttention(every_tokens=8), RecycledAttention(every_tokens=3),
]  # fmt: skip


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.card.name)
def test_a_step_does_not_wait_for_the_device(method, repeats):
    budget = {"full": 1.0, "tidaldecode": 0.75}.get(method.card.name, 0.5)
    with attach(MODEL, method, budget=budget), torch.no_grad():
        cache = MODEL(tokens(40), use_cache=True)[CACHE]
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        for _ in range(2):
            MODEL(tokens(1, repeats), **{CACHE: cache})
        with Asked() as asked:
            MODEL(tokens(1, repeats), **{CACHE: cache})
    assert not asked.seen


@given(st.sampled_from([Streaming(), Streaming(sink_tokens=0), DUO]), st.floats(0.05, 1.0), st.data())
@settings(max_examples=40, deadline=None)
def test_numbers_say_what_masks_say(method, share, data):
    position = data.draw(st.integers(0, 60))
    prompt = torch.tensor([data.draw(st.integers(0, position))])
    here = site(share, queries=1, keys=61, state={"prompt": prompt})
    (found,) = method.reach([position], here)
    by_row = dataclasses.replace(here, state={"prompt": prompt.expand(2)})
    keys, head = torch.arange(position + 1).expand(2, -1), torch.arange(2)
    mask = method.visible(torch.full((2, 1), position), keys, head, by_row)[:, 0]
    for row, (sinks, recent) in zip(mask, found):
        assert torch.equal(row, (keys[0] < sinks) | (position - keys[0] <= recent))
