"""Scores are those of the plain model's own logits; what was kept and held is counted at the end of the context."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from saccade import models
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.errors import BadInput
from saccade.measure.bytes import full_cache_bytes
from saccade.measure.contestants import Contestant, of_families, parse
from saccade.measure.score import BINS, Subject, picture, quality
from saccade.measure.speed import STEPS, speed_round
from tests.conformance.cases import Case, equipped, tiny
from tests.measure.small import model, tokenizer

WHOLE = Budget(1.0)


@dataclass(frozen=True)
class Sample:
    id: str
    context: torch.Tensor
    continuation: torch.Tensor
    scored: slice
    one_pass: bool = False
    facts: dict = field(default_factory=dict)


class Loss:
    metric = "nll"

    def score(self, logits, sample):
        return F.cross_entropy(logits[sample.scored], sample.continuation[0, sample.scored]).item()


class Hit(Loss):
    metric = "hit"

    def score(self, logits, sample):
        return float((logits[sample.scored].argmax(-1) == sample.continuation[0, sample.scored]).all())


def draw(n, m, number=0, one_pass=False):
    ids = torch.randint(3, 127, (1, n + m), generator=rng.generator("test", number))
    return Sample(f"s{number}", ids[:, :n], ids[:, n:], slice(m // 2, m), one_pass, {"length": n})


@pytest.fixture(scope="module")
def subject():
    return Subject(model(), tokenizer())


def expected(sample):
    """One plain forward over everything."""
    ids = torch.cat([sample.context, sample.continuation], 1)
    with torch.no_grad():
        logits = model()(ids).logits[0, sample.context.shape[1] - 1 : -1]
    return Loss().score(logits, sample)


@pytest.mark.parametrize("one_pass", [True, False])
@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 40), m=st.integers(1, 12))
def test_one_pass_and_two_stages_score_the_same_tokens(one_pass, n, m):
    subject, samples = Subject(model(), tokenizer()), [draw(n, m, i, one_pass) for i in range(3)]
    result = quality(subject, parse("full"), WHOLE, Loss(), samples, 0)
    assert [s["id"] for s in result["samples"]] == ["s0", "s1", "s2"]
    for sample, found in zip(samples, result["samples"]):
        assert found["score"] == pytest.approx(expected(sample), rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.sampled_from([12, 20]), min_size=1, max_size=5))
def test_again_is_another_order_in_pairs_and_the_same_scores(lengths):
    subject, samples = Subject(model(), tokenizer()), [draw(n, 6, i) for i, n in enumerate(lengths)]
    once, again = (quality(subject, parse("full"), WHOLE, Loss(), samples, 0, again=a) for a in (False, True))
    for a, b in zip(once["samples"], again["samples"]):
        assert (a["id"], a["facts"], a["bytes_held"]) == (b["id"], b["facts"], b["bytes_held"])
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)


def test_a_cache_method_is_seen_at_the_end_of_the_context(subject):
    sample = draw(80, 40)
    result = quality(subject, parse("knorm"), Budget(0.25), Loss(), [sample], 0)
    one = result["samples"][0]
    assert one["kept_fraction"] == 0.25, "the forty tokens read afterwards are not in it"
    assert one["bytes_full"] == full_cache_bytes(model(), 80)
    assert 0.25 <= one["bytes_held"] / one["bytes_full"] < 0.35
    assert one["prefill_density"] == 1 and one["decode_density"] < 0.6
    assert result["achieved"]["kept_fraction"] == 0.25 and result["part"] == "cache"
    assert not hasattr(model(), "_saccade_run"), "detached again"


def test_sliding_layers_are_counted_on_both_sides():
    subject, sample = Subject(models.tiny("gemma3", window=8), tokenizer()), draw(80, 8)
    full, knorm = (
        quality(subject, parse(name), Budget(0.25), Loss(), [sample], 0)["samples"][0] for name in ("full", "knorm")
    )
    assert full["bytes_held"] == full["bytes_full"] == knorm["bytes_full"]
    # transformers' sliding layer holds a view of the whole prompt until the next token, so it is half of all bytes
    assert 0.5 + 0.25 / 2 <= knorm["bytes_held"] / knorm["bytes_full"] < 0.5 + 0.35 / 2


def test_a_single_pass_has_no_cache_to_speak_of(subject):
    one = quality(subject, parse("random:part=prefill"), Budget(0.5), Loss(), [draw(64, 32, 0, True)], 0)["samples"][0]
    assert not {"kept_fraction", "bytes_held", "decode_density"} & set(one)
    assert 0.2 < one["prefill_density"] <= 0.5


def test_picture_shows_what_was_kept(subject):
    kept = quality(subject, parse("knorm"), Budget(0.25), Loss(), [draw(128, 4)], 0)["kept"]
    assert (
        kept["seen"] == 128 and len(kept["share"]) == 2 and {len(h) for layer in kept["share"] for h in layer} == {BINS}
    )
    for head in (h for layer in kept["share"] for h in layer):
        assert sum(head) / BINS == pytest.approx(0.25)
    assert kept["what"] == "kept" and kept["bits"] is None
    assert quality(subject, parse("full"), WHOLE, Loss(), [draw(128, 4)], 0)["kept"] is None


FAMILIES = of_families(["cache", "decode"])


@pytest.mark.parametrize("name", [*FAMILIES, "streaming", "random", "random:part=decode", "oracle-topk", "snapkv+kivi"])
def test_every_method_of_the_families_is_drawn(name):
    net = tiny(4, 2, 16)
    names = [name] if name.startswith("random") else name.split("+")
    methods = [parse(n).methods[0] if ":" in n else equipped(Case(n).method(), net) for n in names]
    who = Contestant(tuple(methods))
    budget = Budget(0.75) if who.takes_budget else WHOLE
    made = quality(Subject(net, tokenizer()), who, budget, Loss(), [draw(128, 8)], 0)
    kept, achieved = made["kept"], made["achieved"]
    what = "read" if "decode" in who.parts else "bits" if "pack" in who.parts else "kept"
    share = torch.tensor(kept["share"])
    assert (kept["what"], kept["seen"], kept["bits"]) == (what, 128, 64 if what == "bits" else None)
    assert share.shape == (2, 4 if what == "read" else 2, BINS) and 0 <= float(share.min()) <= float(share.max()) <= 1
    if what == "kept":
        assert float(share.mean()) == pytest.approx(achieved["kept_fraction"], abs=0.01)
    else:  # of what is read the prompt's share is about that of all; what is packed takes less than it is
        assert abs(float(share.mean()) - achieved["decode_density"]) < 0.1 if what == "read" else share.mean() < 0.75


@given(seen=st.integers(1, 300), data=st.data())
def test_every_stretch_is_a_share(seen, data):
    from saccade.core.record import Record

    positions = sorted(data.draw(st.sets(st.integers(0, seen - 1), min_size=1)))
    record = Record()
    layer = record.layer(0)
    layer.seen, layer.kept = [seen], [[torch.tensor(positions), torch.arange(seen)]]
    some, whole = picture(record, "kept", seen)["share"][0]
    assert len(some) == min(BINS, seen) and all(0 <= x <= 1 for x in some)
    assert set(whole) == {1.0}
    assert (some == whole) or len(positions) < seen


def test_hits_show_what_was_asked_said_and_expected(subject):
    sample = draw(60, 4)
    one = quality(subject, parse("full"), WHOLE, Hit(), [sample], 0)["samples"][0]
    assert one["expected"] == tokenizer().decode(sample.continuation[0, 2:4].tolist())
    assert len(one["said"]) == len(one["expected"]) and len(one["asked"]) == 48
    assert one["score"] == float(one["said"] == one["expected"])


def test_a_score_that_is_no_number_is_refused(subject):
    class Broken(Loss):
        def score(self, logits, sample):
            return math.nan

    with pytest.raises(BadInput, match=r"sample s0: its score is nan\. The method or the model made NaN or infinity"):
        quality(subject, parse("full"), WHOLE, Broken(), [draw(8, 4)], 0)


def test_rounds_time_everybody_and_begin_with_another(subject):
    field = [(parse("full"), WHOLE), (parse("knorm"), Budget(0.25)), (parse("minference"), Budget(0.25))]
    ids = draw(64, 0).context
    for number in range(3):
        measures = speed_round(subject, field, ids, number, 0)["measures"]
        assert [m["label"] for m in measures] == ["full", "knorm", "minference"]
        assert all(m["error"] is None and m["prefill_seconds"] > 0 and m["decode_seconds"] > 0 for m in measures)
    full, knorm, _ = measures
    assert full["bytes_held"] == full_cache_bytes(model(), 64 - STEPS) and knorm["bytes_held"] < full["bytes_held"] / 2
    assert full["budget"] == "1" and knorm["budget"] == "0.25"


def test_one_that_fails_does_not_stop_the_round(subject):
    field = [(parse("full"), WHOLE), (parse("double-sparsity"), Budget(0.25))]
    full, failed = sorted(
        speed_round(subject, field, draw(64, 0).context, 0, 0)["measures"], key=lambda m: m["label"] != "full"
    )
    assert full["error"] is None
    assert failed["error"]["type"] == "CannotRun" and "saccade calibrate double-sparsity" in failed["error"]["text"]
