"""Lines against a builder that follows the paper step by step; budgets; shapes per head; the search."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import ops
from saccade.attach import attach
from saccade.attach.calibration import Subject
from saccade.core.artefact import Artefact
from saccade.core.errors import BadBudget, BadOption, CannotRun
from saccade.core.selection import Blocks, Lines, PerHead, Spans, causal_mask
from saccade.methods.sparse.minference import CANDIDATES, DEFAULT, MInference
from tests.methods.handmade import noise, site, tiny, tokens, under_mask

SHARES = st.floats(0.02, 1.0)


def tensors(n, queries=None, scale=3.0):
    return scale * noise(1, 4, queries or n, 8, name="q"), noise(1, 2, n, 8, name="k")


def with_patterns(*rows):
    """A method that has been told the candidate of each head, by layer."""
    figures = {"candidates": [list(c) for c in CANDIDATES]}
    made = Artefact("minference", {"pattern": torch.tensor(rows)}, "made up", "0", figures=figures)
    return MInference(artefact=made)


def built(verticals, slashes, n, block):
    """(row, key) pairs by the paper's index builder: growing ranges of far to near diagonals, then single columns."""
    pairs = set()
    for first in range(0, n, block):
        end, runs = first + block, []
        for o in sorted((o for o in slashes if o < end), reverse=True):
            edge = max(end - o, block)
            if not runs or edge > runs[-1][1] + block:
                runs.append([edge - block, edge])
            elif edge > runs[-1][1]:
                runs[-1][1] += block
        singles = [c for c in verticals if c < end and not any(a <= c < b for a, b in runs)]
        keys = [c for a, b in runs for c in range(a, b)] + singles
        assert len(keys) == len(set(keys)), "a key counted twice"
        pairs |= {(r, c) for r in range(first, min(end, n)) for c in keys if c <= r}
    return pairs


@given(st.integers(3, 150), SHARES, st.sampled_from([1, 4, 16, 64]))
def test_lines_are_those_of_the_papers_builder(n, share, block):
    selection = MInference(block_tokens=block, recent_tokens=3).select(*tensors(n), site(share, queries=n, keys=n))
    if not isinstance(selection, Lines):
        assert site(share, queries=n, keys=n).budget.row_tokens(n) == n
        return
    for head in range(4):
        v, s = (x[0, head][x[0, head] >= 0].tolist() for x in (selection.verticals, selection.slashes))
        found = {tuple(pair) for pair in selection.mask()[0, head].nonzero().tolist()}
        assert found == built(v, s, n, selection.block)


@given(st.integers(1, 40), st.integers(1, 12))
def test_scores_are_sums_over_columns_and_diagonals(n, last):
    last = min(last, n)
    q, k = tensors(n, last)
    columns, diagonals = ops.line_scores(q, k)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 8**-0.5
    p = logits.masked_fill(~causal_mask(last, n), -torch.inf).softmax(-1)
    torch.testing.assert_close(columns, p.sum(-2))
    behind = torch.arange(n - last, n)[:, None] - torch.arange(n)
    wanted = torch.stack([(p * (behind == o)).sum((-2, -1)) for o in range(n)], -1)
    torch.testing.assert_close(diagonals, wanted)


def allowed_pairs(n, queries, share):
    row = site(share, queries=queries, keys=n).budget.row_tokens(n)
    return sum(min(i + 1, row) for i in range(n - queries, n))


@given(st.integers(1, 200), st.integers(1, 200), SHARES, st.integers(0, len(CANDIDATES) - 1))
def test_every_shape_stays_within_the_budget_and_sees_something(n, queries, share, candidate):
    queries = min(queries, n)
    method = with_patterns([candidate] * 4, [candidate] * 4)
    selection = method.select(*tensors(n, queries), site(share, queries=queries, keys=n))
    mask = selection.mask()
    assert mask.any(-1).all()
    if n - queries == 0 or CANDIDATES[candidate].shape != "blocks":
        assert mask.sum((-2, -1)).max() <= max(allowed_pairs(n, queries, share), queries)
    assert torch.equal(selection.count().long(), mask.sum((-2, -1)))
    if CANDIDATES[candidate].shape != "blocks":
        assert mask.diagonal(offset=n - queries, dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_most_of_the_budget_is_spent(share):
    selection = MInference().select(*tensors(1024), site(share, queries=1024, keys=1024))
    assert selection.density().mean() > 0.9 * share


@given(st.integers(20, 150), st.lists(st.integers(0, len(CANDIDATES) - 1), min_size=4, max_size=4))
def test_heads_of_different_shapes_are_each_as_if_alone(n, chosen):
    here, (q, k) = site(0.4, queries=n, keys=n), tensors(n)
    mixed = with_patterns(chosen, chosen).select(q, k, here).mask().expand(1, 4, n, n)
    for head, candidate in enumerate(chosen):
        alone = with_patterns([candidate] * 4, [candidate] * 4).select(q, k, here).mask().expand(1, 4, n, n)
        assert torch.equal(mixed[:, head], alone[:, head])


def test_shapes_become_kinds():
    here, (q, k) = site(0.4, queries=100, keys=100), tensors(100)
    assert isinstance(with_patterns([4] * 4).select(q, k, here), Spans)
    assert isinstance(with_patterns([0, 4, 4, 5]).select(q, k, here), PerHead)
    blocks = with_patterns([5] * 4).select(q, k, here)
    assert isinstance(blocks, Blocks)
    count = blocks.table().sum(-1)
    keep = here.budget.row_tokens(100) // blocks.k_block
    assert (count == torch.arange(1, count.shape[-1] + 1).clamp(max=keep)).all()


def test_searched_sizes_are_those_of_the_pattern():
    n, method = 2000, MInference(sizes="pattern")
    lines = method.select(*tensors(n), site(queries=n, keys=n))
    v, s = DEFAULT.at(n)
    assert (lines.verticals.shape[-1], lines.slashes.shape[-1]) == (int(v), int(s)) == (66, 406)
    few = method.select(*tensors(200), site(queries=200, keys=200))
    assert (few.verticals.shape[-1], few.slashes.shape[-1]) == (30, 100)
    ends = dataclasses.replace(with_patterns([4] * 4), sizes="pattern")
    spans = ends.select(*tensors(256), site(queries=256, keys=256))
    assert spans.sinks.tolist() == [2] * 4 and spans.window.tolist() == [12] * 4


def test_the_last_queries_find_a_column_and_a_diagonal():
    n = 512
    q, k = torch.zeros(1, 4, n, 8), 0.1 * noise(1, 2, n, 8)
    q[..., 0], k[:, :, 200, 0] = 8.0, 8.0
    lines = MInference(sink_tokens=0, recent_tokens=1).select(q, k, site(0.2, queries=n, keys=n))
    assert (lines.verticals[0, :, 0] == 200).all()
    q, k = torch.zeros(1, 4, n, n), torch.zeros(1, 2, n, n)
    k[0, :] = torch.eye(n) * 20
    q[0, :, 150:] = torch.eye(n)[: n - 150] * 20  # each query matches the key 150 behind it
    lines = MInference(sink_tokens=0, recent_tokens=1).select(q, k, site(0.3, queries=n, keys=n))
    assert (lines.slashes[0, :, 1] == 150).all()


def test_short_prompts_are_dense_and_say_so(caplog):
    with caplog.at_level(logging.INFO, logger="saccade"):
        selection = MInference(min_len_tokens=101).select(*tensors(100), site(0.2, queries=100, keys=100))
    assert selection.density() == 1 and "100 tokens < min_len_tokens=101, computed dense" in caplog.text


def test_the_search_finds_what_was_planted():
    n, layers = 256, 1
    q, k = 0.1 * noise(1, 2, n, 8), 0.1 * noise(1, 1, n, 8)
    q[..., 0] = 9.0
    k[:, :, torch.arange(3, n, 5), 0] = 9.0  # many columns: best with few diagonals
    place = SimpleNamespace(layer=0, layers=1, heads=2, kv_heads=1, head_size=8, scale=1.0, softcap=None)
    spot = SimpleNamespace(place=dataclasses.make_dataclass("Place", vars(place))(**vars(place)))
    seen = {}
    model = SimpleNamespace(
        layers=layers,
        heads=2,
        found=SimpleNamespace(sites=[spot]),
        capture_qkv=lambda samples: iter([(0, q, k, k)]),
        artefact=lambda method, tensors, samples, figures: seen.update(tensors=tensors, figures=figures),
    )
    MInference(recent_tokens=1, sink_tokens=0).calibrate(model, [torch.zeros(1, n)])
    assert CANDIDATES[int(seen["tensors"]["pattern"][0, 0])][:3] == ("lines", 1500, 64)
    figures = seen["figures"]
    assert figures["heads"][3] == 2 and figures["kept_mass_of_best"] == max(figures["kept_mass"])


def test_a_calibrated_model_runs_under_its_patterns():
    model, ids, n = tiny(), tokens(90), 90
    steps = []
    made = MInference().calibrate(Subject(model), [ids], lambda *step: steps.append(step[:2]))
    assert steps == [(1, 2), (2, 2)] and made.tensors["pattern"].shape == (2, 4)
    method = MInference(artefact=made)
    with attach(model, method, budget=0.3) as run, torch.no_grad():
        found = model(ids).logits
    assert 0 < run.record.density() <= 0.3

    def mask(layer, q, k):
        here = site(0.3, queries=n, keys=n, layer=layer, scale=q.shape[-1] ** -0.5)
        return method.select(q, k, here).mask().expand(1, 4, n, n)

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def test_a_full_budget_is_dense():
    model, ids = tiny(), tokens(70)
    with torch.no_grad():
        alone = model(ids).logits
        with attach(model, "minference"):
            torch.testing.assert_close(model(ids).logits, alone)


def test_what_cannot_run_is_refused():
    with pytest.raises(BadOption, match=r"minference\.last_queries=0: it takes at least 1"):
        MInference(last_queries=0)
    with pytest.raises(BadBudget, match="a fraction kept cannot exceed 1"):
        MInference(search_density=2.0)
    with pytest.raises(CannotRun, match=r"'pattern' computes what was searched, and would ignore the budget 0\.5"):
        attach(tiny(), MInference(sizes="pattern"), budget=0.5)
    wrong = with_patterns([0, 0]).check(site(0.5, queries=9, keys=9))
    assert wrong == ["its patterns are for (layers, heads) = (1, 2), here: (2, 4)"]
    assert "is in bytes; give a fraction or tokens" in MInference().check(site("1KiB", queries=9, keys=9))[0]
