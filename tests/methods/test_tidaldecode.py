"""TidalDecode against plain loops: what two layers choose, who reads it, what the budget pays, and which layer is c."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, fingerprint
from saccade.attach.calibration import Subject
from saccade.attach.compat import CACHE
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, CannotRun, DoesNotCompose
from saccade.core.paths import SHIPPED
from saccade.methods.decode.tidaldecode import TidalDecode, best_keys, best_layer, reused
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens, under_mask

BUDGETS = ["1tok", "4tok", 0.5, 0.8, 1.0]
groups = st.sampled_from(["per-head", "sum"])


def reader(**changes):
    """s is layer 1; no c unless asked for."""
    return TidalDecode(**{"dense_layers": 1, "reselect_layer": "none", **changes})


def reads(budget, seen, layers, whole):
    """Keys of a query in the layers that read everything, and in the others."""
    asked = Budget.of(budget)
    even = asked.tokens(seen)
    left = even * layers - whole * seen
    if asked.unit != "fraction" or even == seen or left < layers - whole:
        return even, even
    return seen, left // (layers - whole)


def ranking(q, k, row, head, group, force):
    """Key numbers, best first, of q [h n d] at `row` over k [g n d]; `row` is a key's number too."""
    sharing = q.shape[0] // k.shape[0]
    heads = [head]
    if group == "sum":
        heads = [h for h in range(q.shape[0]) if h // sharing == head // sharing]
    score = [0.0] * (row + 1)
    for h in heads:
        logits = [float(q[h, row] @ k[h // sharing, j]) for j in range(row + 1)]
        if group == "sum":
            scaled = [x * q.shape[-1] ** -0.5 for x in logits]
            most = max(scaled)
            parts = [math.exp(x - most) for x in scaled]
            logits = [x / sum(parts) for x in parts]
        score = [a + b for a, b in zip(score, logits)]
    return sorted(range(row + 1), key=lambda j: (force and j == row, score[j]), reverse=True)


@given(st.integers(1, 24), st.integers(1, 4), st.sampled_from(BUDGETS), groups, st.booleans(), st.sampled_from([1, 4]))
@settings(max_examples=40, deadline=None)
def test_a_layer_that_chooses_takes_the_best_keys_and_those_behind_read_them(n, queries, budget, group, force, layer):
    queries = min(queries, n)
    q, k = noise(2, 4, queries, 8, name="q").double(), noise(2, 2, n, 8, name="k").double()
    method = reader(reselect_layer=4, group=group, force_current=force)
    here = site(budget, queries=queries, keys=n, stage="decode", layers=6, layer=layer)
    own = method.select(q, {"keys": k}, here).mask().expand(2, 4, -1, -1)
    behind = site(budget, queries=queries, keys=n, stage="decode", layers=6, layer=layer + 1, handed=here.handed)
    later = method.select(q, {"keys": k}, behind).mask().expand(2, 4, -1, -1)
    late = torch.nn.functional.pad(q, (0, 0, n - queries, 0))  # so that rows are numbered as keys are
    for b in range(2):
        for row in range(n - queries, n):
            whole, few = reads(budget, row + 1, 6, 3)
            for head in range(4):
                best = ranking(late[b], k[b], row, head, group, force)
                for mask, count in ((own, whole), (later, few)):
                    found = mask[b, head, row - n + queries].nonzero()[:, 0].tolist()
                    assert found == sorted(best[:count])


@given(st.integers(1, 200), st.integers(2, 12), st.integers(0, 9), st.booleans(), st.floats(0.05, 1.0))
@settings(deadline=None)
def test_the_mean_over_the_layers_is_the_budget(n, layers, first, twice, share):
    first = min(first, layers - 2)
    again = "none" if not twice or first + 2 > layers - 1 else first + 2
    method, handed, counts = TidalDecode(dense_layers=first, reselect_layer=again), {}, []
    q, k = noise(1, 4, 1, 8, name="q"), noise(1, 2, n, 8, name="k")
    for budget in (share, "5tok"):
        for layer in range(layers):
            here = site(budget, queries=1, keys=n, stage="decode", layers=layers, layer=layer, handed=handed)
            if method.check(here):
                assert layer == 0 and budget == share
                break
            counts.append(int(method.select(q, {"keys": k}, here).mask().expand(1, 4, -1, -1)[0, 0].sum()))
        assert min(counts, default=1) >= 1
        assert sum(counts) <= Budget.of(budget).tokens(n) * layers
        counts.clear()


@pytest.mark.parametrize("again", ["none", 3, "calibrated"])
@pytest.mark.parametrize("group", ["per-head", "sum"])
@pytest.mark.parametrize("budget", [0.8, "9tok"])
def test_a_model_reads_what_two_layers_chose(budget, group, again):
    model, ids, n, prompt = tiny(layers=6), tokens(40), 40, 32
    recall = torch.full((6, 4, 6), 0.5)
    recall[3, :, 4:] = 0.9  # so that calibration would say 3
    made = Artefact("tidaldecode", {"recall": recall}, "tiny", fingerprint(model))
    with attach(model, reader(reselect_layer=again, group=group, artefact=made), budget=budget) as run:
        found = in_pieces(model, ids, [prompt, prompt + 1])
        assert budget != 0.8 or run.record.density("decode") <= budget
    choosing, chosen = {1} if again == "none" else {1, 3}, {}

    def mask(layer, q, k):
        allowed = torch.ones(1, 4, n, n, dtype=torch.bool)
        for row in range(prompt, n):
            whole, few = reads(budget, row + 1, 6, 1 + len(choosing))
            for head in range(4):
                best = ranking(q[0], k[0], row, head, group, True)
                if layer in choosing:
                    chosen[row, head] = best[:few]
                keys = best[:whole] if layer < 1 or layer in choosing else chosen[row, head]
                allowed[0, head, row] = False
                allowed[0, head, row, keys] = True
        return allowed

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_every_token_chooses_anew_and_layers_share_the_choice(monkeypatch):
    model, ids, read = tiny(layers=6), tokens(42), {}
    plain = TidalDecode.select

    def select(self, q, stored, here):
        out = plain(self, q, stored, here)
        read[here.keys, here.layer] = here.handed["index"].clone() if "index" in here.handed else None
        return out

    monkeypatch.setattr(TidalDecode, "select", select)
    with attach(model, reader(reselect_layer=3), budget=0.6):
        in_pieces(model, ids, [40, 41])
    for n in (41, 42):
        lists = [read[n, layer] for layer in range(6)]
        assert lists[0] is None, "the step before left something"
        assert torch.equal(lists[1], lists[2]) and torch.equal(lists[3], lists[4]) and torch.equal(lists[3], lists[5])
        assert not torch.equal(lists[1].sort(-1).values, lists[3].sort(-1).values)
    assert not torch.equal(read[41, 1].sort(-1).values, read[42, 1].sort(-1).values)


@pytest.mark.parametrize("budget", [1.0, "99tok"])
def test_full_budget_is_dense(budget):
    model, ids = tiny(layers=4), tokens(30)
    with attach(model, reader(), budget=budget):
        found = in_pieces(model, ids, [20, 21])
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits)


def test_tokens_are_read_again_densely():
    """From then on it is as if the prompt had been so much longer; until then, as if none were read again."""
    model, ids, prompt, every = tiny(layers=4), tokens(45), 30, 5
    with attach(model, reader(correct_tokens=every), budget=0.7):
        found = in_pieces(model, ids, list(range(prompt, 45)))
    for start in range(prompt, 45, every):
        with attach(model, reader(), budget=0.7):
            expected = in_pieces(model, ids, list(range(start, 45)))
        part = slice(start, start + every)
        torch.testing.assert_close(found[:, part], expected[:, part])
    assert not torch.allclose(found[:, 40:], plainly(model, ids, prompt)[:, 40:])


def plainly(model, ids, prompt):
    with attach(model, reader(), budget=0.7):
        return in_pieces(model, ids, list(range(prompt, ids.shape[1])))


# --- which layer is c -------------------------------------------------------------------------------------------------


@given(st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_the_best_keys_of_the_last_queries(n):
    q, k = noise(1, 4, n, 8, name="q"), noise(1, 2, n, 8, name="k")
    found, first = best_keys(q, k), max(0, n - 32)
    for head in range(4):
        for row in range(first, n):
            score = [float(q[0, head, row] @ k[0, head // 2, j]) for j in range(row + 1)]
            best = sorted(range(row + 1), key=lambda j: score[j], reverse=True)[: max(1, min(first + 1, n // 16))]
            assert found[0, head, row - first].nonzero()[:, 0].tolist() == sorted(best)


def test_recall_is_the_share_of_common_keys():
    model, samples = tiny(layers=4), [tokens(64), tokens(40)]
    found = reader().calibrate(Subject(model), samples)
    best = {}
    for i, (layer, q, k, _) in enumerate(Subject(model).capture_qkv(samples)):
        best[i // 4, layer] = best_keys(q, k)[0]
    for one in range(4):
        for other in range(4):
            for head in range(4):
                shares = []
                for sample in range(2):
                    a, b = best[sample, one][head], best[sample, other][head]
                    shares.append(float((a & b).sum() / a.sum()))
                assert math.isclose(found.tensors["recall"][one, head, other], sum(shares) / 2, abs_tol=1e-6)
    assert found.fingerprint == fingerprint(model) and found.data.startswith("2 rows, 104 tokens, sha256 ")
    again = found.figures["layer that chooses anew"]
    assert again == 2 and reader(reselect_layer="calibrated", artefact=found).choosing == (1, 2)
    assert found.figures["with it"] >= found.figures["recall of the layers behind s"]


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
@settings(deadline=None)
def test_c_serves_the_layers_behind_best(layers, first, seed):
    first = min(first, layers - 1)
    recall = noise(layers, layers, name=f"recall {seed}").sigmoid()

    def served(again):
        total, choosing = 0.0, first
        for layer in range(first + 1, layers):
            choosing = again if layer == again else choosing
            total += 1.0 if layer == again else float(recall[choosing, layer])
        return total

    for again in [None, *range(first + 1, layers)]:
        assert math.isclose(float(reused(recall, first, again).sum()), served(again), abs_tol=1e-5)
    candidates = range(first + 1, layers - 1)  # behind the last layer nobody is served
    found = best_layer(recall, first)
    assert (found is None) == (len(candidates) == 0)
    if found is not None:
        assert math.isclose(served(found), max(map(served, candidates)), abs_tol=1e-5)


def test_shipped_recalls_are_those_of_smollm2():
    shipped = Artefact.load(SHIPPED / "tidaldecode" / "smollm2")
    recall = shipped.tensors["recall"]
    assert shipped.method == "tidaldecode" and recall.shape == (30, 9, 30)
    assert torch.equal(recall.transpose(0, 2), recall) and ((recall >= 0) & (recall <= 1)).all()
    assert torch.equal(recall.diagonal(dim1=0, dim2=2), torch.ones(9, 30))
    assert TidalDecode(artefact=shipped).choosing == (2, shipped.figures["layer that chooses anew"])


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_run_says_why():
    here = site(0.5, queries=1, keys=1, layers=4)
    assert TidalDecode().check(here) == [
        "no layer to choose anew was found for this model: saccade calibrate tidaldecode"
    ]
    foreign = Artefact("tidaldecode", {"recall": torch.ones(3, 4, 3)}, "tiny", "")
    assert TidalDecode(artefact=foreign).check(here) == [
        "its recalls are [layers, heads, layers] = [3, 4, 3], here: [4, 4, 4]"
    ]
    assert reader(dense_layers=3).check(here) == ["dense_layers=3 of 4 leaves no layer that could read a list again"]
    assert reader(reselect_layer=2).check(here) == [
        "dense_layers=1 and the layers that choose, together 3 of 4, alone exceed budget=0.5; change one of the two"
    ]
    for again in (0, 1, 4):
        assert reader(reselect_layer=again).check(here) == [
            f"reselect_layer={again} must lie behind layer s, which dense_layers=1 makes layer 1, and before 4, the"
            " number of layers"
        ]
    assert reader(dense_layers=9).check(site(1.0, queries=1, keys=1)) == []
    assert reader(reselect_layer=2).check(site("3tok", queries=1, keys=1, layers=4)) == []


@pytest.mark.parametrize("wrong", [-1, True, "never", 2.0, None])
def test_c_is_a_layer_or_a_word(wrong):
    said = rf"tidaldecode.reselect_layer={wrong!r}: it takes a layer's number, 'calibrated' or 'none'. Give one of"
    with pytest.raises(BadOption, match=said):
        TidalDecode(reselect_layer=wrong)


def test_reading_again_needs_token_ids():
    model, ids = tiny(layers=4), tokens(24)
    embeddings = model.get_input_embeddings()(ids)
    with attach(model, reader(correct_tokens=4), budget=0.7) as run, torch.no_grad():
        cache = run.new_cache()
        model(inputs_embeds=embeddings[:, :20], **{CACHE: cache})
        said = r"read tokens again every 4 under tidaldecode: this forward was given embeddings in place of token ids"
        with pytest.raises(CannotRun, match=said):
            model(inputs_embeds=embeddings[:, 20:21], **{CACHE: cache})


@pytest.mark.parametrize("eviction", ["snapkv", "streaming"])
def test_it_does_not_compose_with_an_eviction(eviction):
    said = rf"'tidaldecode' counts on all keys being there in every layer, and '{eviction}' drops some"
    with pytest.raises(DoesNotCompose, match=said):
        attach(tiny(layers=4), [reader(), eviction], budget=0.8)
