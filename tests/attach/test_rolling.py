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
from saccade.attach.engine import Engine
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
    here = site(share, queries=1, keys=61, stage="decode", state={"prompt": prompt})
    (found,) = method.reach([position], here)
    by_row = dataclasses.replace(here, state={"prompt": prompt.expand(2)})
    keys, head = torch.arange(position + 1).expand(2, -1), torch.arange(2)
    mask = method.visible(torch.full((2, 1), position), keys, head, by_row)[:, 0]
    for row, (sinks, recent) in zip(mask, found):
        assert torch.equal(row, (keys[0] < sinks) | (position - keys[0] <= recent))


ROLL = dataclasses.replace(RAZOR, policy="roll", fold_tokens=4)


def named(what):
    return getattr(what, "card", None) and what.card.name


def stored(layer, rows):
    """Tokens and bytes of some heads, which are as long as one another: of whole storages, room behind them too."""
    (bucket,) = [b for b in layer.store.buckets if set(b.rows.tolist()) & rows]
    assert set(bucket.rows.tolist()) == rows, "others are as long"
    return bucket.length, sum(x.untyped_storage().nbytes() for x in bucket.tensors())


@pytest.mark.parametrize(("method", "windows"), [(Streaming(), {0, 1}), (DUO, {1}), (ROLL, {1})], ids=named)
def test_a_window_is_as_long_after_a_hundred_thousand_tokens(method, windows, monkeypatch):
    """Attention is left out behind the prompt: what it gives is stored nowhere."""
    with attach(MODEL, method, budget="25tok"), torch.no_grad():
        layer = MODEL(tokens(40), use_cache=True)[CACHE].layers[0]
        monkeypatch.setattr(Engine, "_attend", lambda self, layer, q, *rest: q)

        def step(count):
            q, k = (torch.zeros(1, heads, count, 16, dtype=torch.float64) for heads in (4, 2))
            layer.engine.forward(layer, q, k, k, None)

        def rounds():
            return [(step(1), stored(layer, windows))[1] for _ in range(2 * ROLL.fold_tokens)]

        step(3 * ROLL.fold_tokens)
        early = rounds()
        for _ in range(40):
            step(2500)
        assert rounds() == early and max(length for length, _ in early) < 40
        assert layer.store.seen[0] > 100_000
        if windows == {1}:
            assert stored(layer, {0})[0] == layer.store.seen[0], "the other head keeps all"
