"""KIVI: its formula in plain loops, a dense pass over what it rounds, bytes, and what it is attached with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, explain
from saccade.attach.compat import CACHE
from saccade.attach.listening import listening
from saccade.attach.probe import probe
from saccade.core.errors import BadOption, CannotRun, DoesNotCompose
from saccade.core.selection import causal_mask
from saccade.methods.cache.kivi import Kivi
from saccade.methods.cache.snapkv import SnapKV
from saccade.ops.attend.reference import masked
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens

SIDES = [("channel", "token"), ("token", "channel")]


def packer(**changes):
    return Kivi(**{"group_tokens": 8, "group_channels": 4, "residual_tokens": 8, **changes})


def nearest(x, bits):
    """One group: every number as the nearest of 2^bits equally far steps from the least to the largest."""
    low, high = float(x.min()), float(x.max())
    step = (high - low) / (2**bits - 1)
    return x if step == 0 else ((x - low) / step).round() * step + low


def rounded(x, along, bits, wide, size):
    """[r n d] in float64, group by group."""
    x = x.double().clone()
    for row in x:
        for t in range(0, len(row), wide if along == "channel" else 1):
            for c in range(0, row.shape[1], 1 if along == "channel" else size):
                part = row[t : t + wide, c] if along == "channel" else row[t, c : c + size]
                part.copy_(nearest(part.clone(), bits))
    return x


@given(
    st.integers(1, 3), st.sampled_from([2, 4]), st.sampled_from([1, 3, 8]), st.sampled_from([1, 2, 4, 99]),
    st.sampled_from(SIDES),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_what_is_packed_is_the_formula(units, bits, wide, size, sides):
    k, v = (noise(2, units * wide, 8, name=name).double() for name in "kv")
    method = packer(bits=bits, group_tokens=wide, group_channels=size, keys=sides[0], values=sides[1])
    packed = method.pack(k, v)
    assert all(x.shape[:2] == (2, units) for x in packed.values())
    assert packed["keys"].dtype == packed["values"].dtype == torch.uint8
    for found, x, along in zip(method.unpack(packed), (k, v), sides):
        torch.testing.assert_close(found, rounded(x, along, bits, wide, min(size, 8)))


@given(st.integers(0, 400), st.integers(1, 40), st.integers(0, 200))
def test_the_newest_are_never_packed_and_whole_groups_behind_them_are(n, wide, residual):
    packed = packer(group_tokens=wide, residual_tokens=residual).packed_tokens(n)
    assert packed % wide == 0 and 0 <= packed <= max(0, n - residual) < packed + wide + (n < residual) * residual


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("sides", SIDES)
def test_decoding_is_dense_attention_over_what_the_codes_stand_for(bits, sides):
    """A token reads rounded what had been packed when it came, all others as they are; the prompt reads all so."""
    model, ids, prompt = tiny(), tokens(70), 40
    method = packer(bits=bits, keys=sides[0], values=sides[1])
    with attach(model, method):
        found = in_pieces(model, ids, [prompt, prompt + 1, prompt + 20])

    class Rounded:
        run = SimpleNamespace(title="oracle")

        def __init__(self, spot):
            self.place = spot.place

        def forward(self, layer, q, k, v, real):
            n, out = k.shape[2], []
            small = [rounded(x[0], side, bits, 8, 4)[None] for x, side in zip((k[:, :, :64], v[:, :, :64]), sides)]
            for i in range(n):
                p = max(0, i - 8) // 8 * 8 if i >= prompt else 0
                keys, values = (torch.cat([a[:, :, :p], b[:, :, p:]], 2) for a, b in zip(small, (k, v)))
                seen = causal_mask(n, n)[i : i + 1]
                out.append(masked(q[:, :, i : i + 1], keys, values, seen, scale=self.place.scale)[0])
            return torch.cat(out, 2)

    with listening(model, probe(model), Rounded), torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_the_newest_tokens_stay_as_they_are():
    model, ids = tiny(), tokens(61)
    with attach(model, packer()), torch.no_grad():
        cache = model(ids[:, :50], use_cache=True)[CACHE]
        model(ids[:, 50:], **{CACHE: cache})
        rows = cache.layers[0].store.buckets[0]
    whole = model(ids, use_cache=True)[CACHE].layers[0]
    assert rows.front == 48 and rows.length == 61
    torch.testing.assert_close(rows.columns["keys"], whole.keys[0, :, 48:])
    torch.testing.assert_close(rows.columns["values"], whole.values[0, :, 48:])


@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_are_those_of_the_codes(bits):
    model, n = tiny().to(torch.float32), 104
    with attach(model, packer(bits=bits, group_channels=16)) as run:
        in_pieces(model, tokens(n), [60])
    heads, size = 2 * 2, 16  # of two layers
    spans = 96 // 8 * size * 2 * 4 + 96 * 2 * 4  # a pair for each channel of 8 keys, and for each value
    codes, exact = 2 * 96 * size * bits // 8, 2 * 8 * size * 4
    positions, rows = n * 4, 8
    assert run.record.bytes_held == heads * (codes + spans + exact + positions + rows)
    assert run.record.kept_fraction == 1


@pytest.mark.parametrize("others", [["snapkv"], ["minference", "snapkv"]])
def test_what_an_eviction_leaves_is_packed(others):
    model, ids = tiny(), tokens(90)

    def run_with(*methods):
        with attach(model, [*others, *methods], budget=0.5) as run:
            return in_pieces(model, ids, list(range(70, 90))), run.record

    alone, plain = run_with()
    loose, _ = run_with(packer(residual_tokens=99))
    torch.testing.assert_close(loose, alone)
    found, record = run_with(packer(bits=4))
    assert record.kept_fraction == plain.kept_fraction and record.bytes_held < plain.bytes_held
    for a, b in zip(plain.layers.values(), record.layers.values()):
        assert all(len(x) == len(y) for x, y in zip(a.kept[0], b.kept[0]))
    torch.testing.assert_close(found[:, :70], alone[:, :70])
    assert not torch.allclose(found[:, 70:], alone[:, 70:])
    with attach(model, [*others, packer(bits=4)], budget=0.5):
        torch.testing.assert_close(in_pieces(model, ids, [70]), found)


def test_more_bits_and_longer_residuals_are_nearer():
    model, ids = tiny(), tokens(90)
    with torch.no_grad():
        dense = model(ids).logits[:, 60:]

    def lost(**changes):
        with attach(model, packer(**changes)):
            return float((in_pieces(model, ids, [60])[:, 60:] - dense).abs().mean())

    two, four, late, none = lost(bits=2), lost(bits=4), lost(bits=2, residual_tokens=48), lost(residual_tokens=90)
    assert none < late < two and none < four < two


def test_what_cannot_run_says_why():
    with pytest.raises(BadOption, match=r"kivi\.group_tokens=0: a group has one number or more\. Give at least 1"):
        Kivi(group_tokens=0)
    with pytest.raises(BadOption, match=r"kivi\.group_channels=0: a group has one number or more"):
        Kivi(group_channels=0)
    assert Kivi(group_channels=3).check(site(queries=1, keys=1)) == ["group_channels=3 does not divide a head of 8"]
    said = ["bits=2: 4 channels share a byte, and a head has 6"]
    assert Kivi().check(site(queries=1, keys=1, head_size=6)) == said
    alone = "kivi packs all tokens and drops none: attach it without a budget, or beside what takes one"
    for budget in (0.5, "9tok", "1MiB"):
        assert explain(tiny(), "kivi", budget=budget) == [alone]
    assert explain(tiny(), "kivi", budget=1.0) == explain(tiny(), ["snapkv", "kivi"], budget=0.5) == []


@pytest.mark.parametrize("reader", ["quest", "double-sparsity", "random:part=decode"])
def test_it_is_not_read_in_part(reader):
    from saccade.measure.contestants import parse

    name = reader.partition(":")[0]
    said = rf"attach \[{name}, kivi\] together: '{name}' chooses among the keys as they are, and 'kivi' packs them"
    with pytest.raises(DoesNotCompose, match=said):
        parse(f"{reader}+kivi")


@pytest.mark.parametrize("evictor", ["streaming", "duo-attention", "razor-attention"])
def test_what_is_packed_is_not_dropped_later(evictor):
    said = rf"attach \[{evictor}, kivi\] together: '{evictor}' goes on dropping or merging single tokens, and 'kivi'"
    with pytest.raises(DoesNotCompose, match=said):
        attach(tiny(), [evictor, "kivi"], budget=0.5)


def test_assisted_decoding_is_refused_for_a_prompt():
    model = tiny()
    with attach(model, [packer()]) as run, pytest.raises(CannotRun, match=r"assisted decoding with kivi: guessed"):
        run.new_cache().layers[0].activate_past_recording()
    with attach(model, [SnapKV(), packer()], budget=0.5), torch.no_grad():
        cache = model(tokens(50), use_cache=True)[CACHE]
        with pytest.raises(CannotRun, match=r"assisted decoding with snapkv: guessed"):
            cache.layers[0].activate_past_recording()
