"""Double Sparsity against exact top-k, its quantisation formula, and a dense pass under the chosen tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, fingerprint
from saccade.attach.calibration import Subject
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import BadBudget, BadOption, CannotRun
from saccade.core.paths import SHIPPED
from saccade.methods.decode.double_sparsity import DoubleSparsity, dequantise, quantise
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask


def ranked(layers=2, kv_heads=2, size=8):
    return noise(layers, kv_heads, size, name="rank").argsort(-1).to(torch.int16)


def made(mark="", **shape):
    return Artefact("double-sparsity", dict.fromkeys(("q", "k", "qk"), ranked(**shape)), "tiny", mark)


def reader(**changes):
    return DoubleSparsity(**{"channels": 3, "dense_layers": 0, "artefact": made(), **changes})


@pytest.mark.parametrize("group", ["per-head", "max"])
@given(st.integers(1, 30), st.integers(1, 5), st.sampled_from(["1tok", "4tok", 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_with_all_channels_the_choice_is_exact_top_k(group, n, queries, budget):
    queries = min(queries, n)
    q, k = noise(2, 4, queries, 8, name="q"), noise(2, 2, n, 8, name="k")
    here = site(budget, queries=queries, keys=n, stage="decode")
    method = reader(channels=8, group=group)
    mask = method.select(q, {"keys": k, **method.index(k, here)}, here).mask().expand(2, 4, queries, n)
    score = q.double() @ k.repeat_interleave(2, 1).double().mT
    if group == "max":
        score = score.unflatten(1, (2, 2)).amax(2).repeat_interleave(2, 1)
    for row in range(queries):
        seen = n - queries + row + 1
        count = Budget.of(budget).tokens(seen)
        best = torch.zeros(2, 4, n, dtype=torch.bool)
        best.scatter_(-1, score[:, :, row, :seen].topk(count).indices, True)
        assert torch.equal(mask[:, :, row], best)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["1tok", "4tok", 0.3]))
@settings(max_examples=40, deadline=None)
def test_recent_keys_are_read_within_the_budget(n, queries, recent, budget):
    queries = min(queries, n)
    q, k = noise(1, 4, queries, 8, name="q"), noise(1, 2, n, 8, name="k")
    here, method = site(budget, queries=queries, keys=n, stage="decode"), reader(recent_tokens=recent)
    mask = method.select(q, {"keys": k, **method.index(k, here)}, here).mask()
    for row in range(queries):
        seen = n - queries + row + 1
        count = Budget.of(budget).tokens(seen)
        assert (mask[..., row, :].sum(-1) == count).all()
        assert mask[..., row, max(0, seen - min(recent, count)) : seen].all()


@given(st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_labels_are_columns_of_the_keys(channels, n):
    channels = min(channels, 8)
    k, here = noise(2, 2, n, 8), site(queries=n, keys=n, layer=1)
    labels = reader(channels=channels).index(k, here)["labels"]
    for head in range(2):
        assert torch.equal(labels[:, head], k[:, head][..., ranked()[1, head, :channels].long()])


@given(st.sampled_from([4, 2]), st.integers(1, 17), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_quantised_labels_match_the_formula(bits, r, n):
    x = noise(2, n, r)
    packed, span = quantise(x, bits)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == -(-r * bits // 8)
    wide = x.double()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    scale = (2**bits - 1) / torch.where(high == low, 1.0, high - low)
    found = dequantise(packed, span, bits, r).double()
    nearest = ((found - low) * scale).round()
    assert ((nearest >= 0) & (nearest <= 2**bits - 1)).all()
    # never farther than half a step, up to the rounding of float32 itself
    slack = torch.finfo(torch.float32).eps * x.abs().max() * 2
    assert ((found - wide).abs() <= 0.5 / scale + slack).all()
    assert (found.float() == dequantise(*quantise(found.float(), bits), bits, r)).float().mean() > 0.5


@pytest.mark.parametrize("bits", [16, 4, 2])
@pytest.mark.parametrize("prefill", [False, True])
def test_decoding_reads_the_chosen_tokens_and_nothing_else(bits, prefill):
    model, ids, n, prompt = tiny(layers=3), tokens(40), 40, 30
    artefact = made(fingerprint(model), layers=3, size=16)
    method = DoubleSparsity(channels=5, dense_layers=1, label_bits=bits, prefill=prefill, artefact=artefact)
    with attach(model, method, budget=0.6) as run:
        found = in_pieces(model, ids, [prompt, prompt + 1])
        assert run.record.density("decode") <= 0.6

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, n, n, dtype=torch.bool)
        for head in range(4):
            chosen = ranked(3, 2, 16)[layer, head // 2, :5].long()
            asked, labels = q[0, head][:, chosen], k[0, head // 2][:, chosen]
            if bits < 16:
                packed, span = quantise(labels, bits)
                labels, asked = dequantise(packed, span, bits, 5), dequantise(*quantise(asked, bits), bits, 5)
            score = asked.float() @ labels.float().T
            for row in range(0 if prefill else prompt, n):
                even = Budget.of(0.6).tokens(row + 1)
                left = even * 3 - (row + 1)
                count = even if left < 2 or even == row + 1 else (row + 1 if layer == 0 else left // 2)
                allowed[0, head, row] = False
                allowed[0, head, row, score[row, : row + 1].topk(count).indices] = True
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_full_budget_is_dense():
    model, ids = tiny(), tokens(30)
    with attach(model, reader(artefact=made(fingerprint(model), size=16)), budget=1.0):
        found = in_pieces(model, ids, [20, 21])
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits)


def test_statistics_are_accumulated_over_all_samples():
    model, samples = tiny(), [tokens(9), tokens(5)]
    found = DoubleSparsity(channels=2).calibrate(Subject(model), samples)
    totals = {name: torch.zeros(2, 2, 16, dtype=torch.float64) for name in ("q", "k", "qk")}
    for layer, q, k, _ in Subject(model).capture_qkv(samples):
        for head in range(4):
            totals["q"][layer, head // 2] += q[0, head].abs().sum(0)
            totals["qk"][layer, head // 2] += (q[0, head] * k[0, head // 2]).abs().sum(0)
        totals["k"][layer] += k[0].abs().sum(1)
    for name, total in totals.items():
        assert torch.equal(found.tensors[name].long(), total.argsort(-1, descending=True))
    assert found.fingerprint == fingerprint(model) and found.data.startswith("2 rows, 14 tokens, sha256 ")


def test_shipped_channels_are_rankings_of_smollm2():
    shipped = Artefact.load(SHIPPED / "double-sparsity" / "smollm2")
    assert shipped.method == "double-sparsity" and set(shipped.tensors) == {"q", "k", "qk"}
    for order in shipped.tensors.values():
        assert order.shape == (30, 3, 64)
        assert torch.equal(order.long().sort(-1).values, torch.arange(64).expand(30, 3, 64))


def test_what_cannot_run_says_why():
    assert DoubleSparsity().check(site(queries=1, keys=1)) == [
        "no channels were ranked for this model: saccade calibrate double-sparsity",
        "channels=16, but a head has 8",
    ]
    foreign = reader().check(site(queries=1, keys=1, layers=7))
    assert foreign == ["its channels are for [layers, key/value heads, head size] = [2, 2, 8], here: [7, 2, 8]"]
    with pytest.raises(BadOption, match=r"channels=0: no label would be left. Give at least 1"):
        DoubleSparsity(channels=0)
    with pytest.raises(CannotRun, match=r"dense_layers=2 of 2 layers alone exceed budget=0.5"):
        model = tiny()
        attach(model, reader(dense_layers=2, artefact=made(fingerprint(model), size=16)), budget=0.5)


def test_a_budget_in_tokens_below_the_dense_layers_is_said_while_reading():
    model = tiny()
    method = reader(dense_layers=1, artefact=made(fingerprint(model), size=16))
    with attach(model, method, budget="5tok"), pytest.raises(BadBudget, match=r"in 1 of 2 layers leave less than one"):
        in_pieces(model, tokens(24), [20])
