"""SEA: the estimator against a slow one, pixels against the sheet's formula, what is kept and mixed in, training."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.attach import attach, estimating
from saccade.attach.calibration import Subject
from saccade.attach.estimating import first_weights, layer_loss, spread
from saccade.core.artefact import Artefact
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.methods.sparse import sea
from saccade.methods.sparse.sea import Sea, best_pixels, edges, estimate, mixed
from tests.methods.handmade import in_pieces, noise, tiny, tokens
from tests.methods.handmade import site as bare_site
from tests.mixers import assert_as_good

SHORT = Sea(train_steps=20)


def site(budget=1.0, **shape):
    return bare_site(budget, attend=lambda *x: ops.attend(*x)[0], **shape)


def tensors(n, queries=None):
    """q, k, v of four heads over two, in float64."""
    sizes = ((4, queries or n, "q"), (2, n, "k"), (2, n, "v"))
    return [noise(1, heads, many, 8, name=name).double() for heads, many, name in sizes]


def weights(pixels=8):
    """Of one layer, none of them zero."""
    first = first_weights(1, 4, 8, pixels)
    return {name: (x[0] + 0.1 * noise(*x[0].shape, name=name)).double() for name, x in first.items()}


@functools.cache
def learnt():
    subject = Subject(tiny())
    return dataclasses.replace(SHORT, artefact=SHORT.calibrate(subject, [tokens(64 + i)[:, i:] for i in range(2)]))


# --- the estimator ----------------------------------------------------------------------------------------------------


def norm(x):
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)


def slow(q, k, v, w, here):
    """Query by query, and pixel by pixel."""
    n, heads, pixels = q.shape[2], 4, len(w["gain"])
    directions = sea._directions(8, here.layer)
    code = [[f(t * 10_000 ** (-2 * i / 8)) for f in (math.cos, math.sin) for i in range(4)] for t in range(n)]
    low, gates = torch.zeros(2 * heads, n, pixels // 4).double(), torch.zeros(1, heads, n, 2).double()
    for h in range(heads):
        phi = [(directions @ x.T * here.scale**0.5).clamp(min=0) + 1e-3 for x in (q[0, h], k[0, h // 2])]
        for i in range(n):
            share = torch.stack([phi[0][:, i] @ phi[1][:, j] for j in range(i + 1)])
            values = torch.stack([torch.cat([torch.tensor(code[j]).double(), v[0, h // 2, j]]) for j in range(i + 1)])
            e = torch.cat([share @ values / share.sum(), v[0, h // 2, i]]) @ w["encode"] + w["encode_bias"]
            e = torch.nn.functional.gelu(norm(e))
            gates[0, h, i] = 1 / (1 + torch.exp(-(e @ w["mix"][:-1] + w["mix"][-1])))
            low[2 * h : 2 * h + 2, i] = (e @ w["decode"] + w["decode_bias"]).view(2, -1)
            low[2 * h, i], low[2 * h + 1, i] = norm(low[2 * h, i]), norm(low[2 * h + 1, i])
    low = looked(looked(low, w["first"], w["first_bias"], 2).clamp(min=0), w["second"], w["second_bias"], 2)
    high = torch.stack([low[..., p // 4] for p in range(pixels)], -1).clamp(min=0)
    high = looked(high, w["last"], w["last_bias"], 1)
    image = torch.stack([torch.stack([norm(row) * w["gain"] + w["shift"] for row in head]) for head in high])
    return image[None], gates


def looked(x, kernel, bias, step):
    """A convolution of rows up to its own and columns on both sides."""
    _, n, width = x.shape
    out = torch.zeros(len(kernel), n, width).double()
    for i, p in torch.cartesian_prod(torch.arange(n), torch.arange(width)).tolist():
        out[:, i, p] = bias
        for a, b in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
            row, column = i - (2 - a) * step, p + (b - 1) * step
            if row >= 0 and 0 <= column < width:
                out[:, i, p] += kernel[:, :, a, b] @ x[:, row, column]
    return out


def test_the_estimator_is_the_slow_one():
    inputs, w, here = tensors(7), weights(), site(queries=7, keys=7, layer=1)
    for ours, theirs in zip(estimate(*inputs, w, here), slow(*inputs, w, here)):
        assert_as_good(ours, theirs, "estimate")


def test_no_row_of_the_picture_depends_on_a_later_token():
    inputs, w, here = tensors(20), weights(), site(queries=20, keys=20)
    image, gates = estimate(*inputs, w, here)
    other = [torch.cat([x[:, :, :12], -x[:, :, 12:]], 2) for x in inputs]
    assert_as_good(estimate(*other, w, here)[0][:, :, :12], image[:, :, :12], "picture")
    assert_as_good(estimate(*other, w, here)[1][:, :, :12], gates[:, :, :12], "gates")


# --- pixels and tokens ------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(n=st.integers(1, 90), queries=st.integers(1, 90), pixels=st.sampled_from([4, 8, 64]))
def test_every_token_before_a_query_is_in_the_pixel_that_the_formula_gives(n, queries, pixels):
    queries = min(n, queries)
    edge = edges(queries, n, pixels, torch.device("cpu"))
    image = torch.arange(pixels).double().expand(1, 1, n, pixels)
    for row, length in enumerate(range(n - queries + 1, n + 1)):
        wanted = [max(0, math.floor((j + 0.5) / length * pixels - 1e-4)) for j in range(length)]
        held = [p for p in range(pixels) for _ in range(int(edge[row, p]), int(edge[row, p + 1]))]
        assert held == wanted[:-1] and int(edge[row, 0]) == 0 and int(edge[row, -1]) == length - 1
        assert spread(image)[0, 0, length - 1, :length].tolist() == wanted


@settings(max_examples=12)
@given(st.integers(2, 60), st.integers(1, 60), st.integers(1, 30), st.sampled_from([4, 16]))
def test_the_best_pixels_of_all_heads_are_kept_while_they_are_paid_for(n, queries, row, pixels):
    queries = min(n, queries)
    if row >= n:
        return
    q, k, _ = tensors(n, queries)
    image, here = noise(1, 4, queries, pixels, name="image").double(), site(f"{row}tok", queries=queries, keys=n)
    mask = Sea().select(q, k, dataclasses.replace(here, handed={"image": image})).mask()[0]
    wanted, edge = torch.zeros_like(mask), edges(queries, n, pixels, image.device)
    for i in range(queries):
        share = [(-float(image[0, h, i].softmax(0)[p]), h, p) for h in range(4) for p in range(pixels)]
        wanted[:, i, n - queries + i] = True
        left = 4 * min(row - 1, n - queries + i)
        for _, h, p in sorted(share):
            first, end = edge[i, p].item(), edge[i, p + 1].item()
            left -= end - first
            if left < 0:
                break
            wanted[h, i, first:end] = True
    assert torch.equal(mask, wanted)


def test_the_output_is_the_kept_pairs_and_the_mean():
    n, w = 30, weights()
    inputs, here = tensors(n), site("6tok", queries=n, keys=n)
    method = Sea(artefact=Artefact("sea", {name: x[None] for name, x in w.items()}, "", ""))
    w = {name: x.float().double() for name, x in w.items()}  # as they are read
    image, gates = estimate(*inputs, w, here)
    mask = method.select(*inputs[:2], dataclasses.replace(here, handed={"image": image})).mask()
    q, k, v = inputs[0], *(x.repeat_interleave(2, 1) for x in inputs[1:])
    kept = (q @ k.mT * here.scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    mean = torch.stack([v[:, :, : i + 1].mean(2) for i in range(n)], 2)
    wanted = gates[..., :1] * gates[..., 1:] * kept + (1 - gates[..., 1:]) * mean
    assert_as_good(method.attend(*inputs, here), wanted, "output")
    open_gates = torch.ones(1, 4, n, 2).double()
    assert torch.equal(mixed(kept, inputs[2], open_gates), kept)
    everything = best_pixels(image, edges(n, n, 8, image.device), n)
    assert torch.equal(everything, (edges(n, n, 8, image.device).diff(dim=-1) > 0).expand_as(everything))


# --- training, in a model ---------------------------------------------------------------------------------------------


def test_a_loss_of_nothing_is_reached_where_the_picture_is_the_map():
    """One pixel a token, and all of them kept: what is left is how far the gates are from open."""
    n, w = 4, weights(4)
    w["mix"] = torch.cat([torch.zeros(16, 2), torch.full((1, 2), 50.0)]).double()
    q, k, v = tensors(n)
    flat = torch.zeros_like(q)  # its map is flat in every row, and a picture without gain too
    w["gain"], w["shift"] = torch.zeros(4).double(), torch.zeros(4).double()
    assert_as_good(layer_loss(flat, k, v, w, site(queries=n, keys=n)) + 1, torch.ones(()).double(), "loss")


def test_estimators_come_closer_to_the_maps():
    made = learnt().artefact
    assert made.figures["loss"] < 0.9 * made.figures["loss_at_first"]
    assert {x.dtype for x in made.tensors.values()} == {torch.float16}
    with pytest.raises(BadInput, match=r"train estimators on rows of \[8, 9\] tokens"):
        SHORT.calibrate(Subject(tiny()), [tokens(8), tokens(9)])


def test_training_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(estimating, "SAVED_EVERY", 2)
    recipe, rows = Sea(train_steps=5, train_texts=2), [tokens(12 + i)[:, i:] for i in range(3)]
    alone, steps = recipe.calibrate(Subject(tiny()), rows), []

    def cut(done, total, what):
        steps.append(what)
        if done == 3 + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.calibrate(Subject(tiny(), tmp_path), rows, cut)
    steps.clear()
    again = recipe.calibrate(Subject(tiny(), tmp_path), rows, lambda *said: steps.append(said[2]))
    assert len(steps) == 3 + 3  # texts are read anew, two of the five steps are not
    assert all(torch.equal(x, again.tensors[name]) for name, x in alone.tensors.items())
    assert again.figures == alone.figures and not list(tmp_path.rglob("*.safetensors"))


def test_a_full_budget_is_dense_and_less_is_not():
    model, ids = tiny(), tokens(60)
    with torch.no_grad():
        alone = model(ids).logits
    with attach(model, learnt()):
        torch.testing.assert_close(in_pieces(model, ids, [50]), alone)
    with attach(model, learnt(), budget=0.3) as run:
        assert not torch.allclose(in_pieces(model, ids, [50]), alone)
    assert 0.2 < run.record.density("prefill") <= 0.3


def test_what_cannot_be():
    for options, text in (
        ({"pixels": 6}, r"sea\.pixels=6: it takes a multiple of 4"),
        ({"train_steps": 0}, r"sea\.train_steps=0: it takes at least 1"),
        ({"train_texts": 0}, r"sea\.train_texts=0: it takes at least 1"),
        ({"train_share": 0.0}, r"sea\.train_share=0\.0: it takes a share of the pairs"),
        ({"learning_rate": 0.0}, r"sea\.learning_rate=0\.0: it takes a number above 0"),
    ):
        with pytest.raises(BadOption, match=text):
            Sea(**options)
    with pytest.raises(CannotRun, match="no estimator was trained for this model: saccade calibrate sea"):
        attach(tiny(), Sea(), budget=0.5)
    with pytest.raises(CannotRun, match="pixels=8, and its estimator was trained to draw 64"):
        attach(tiny(), dataclasses.replace(learnt(), pixels=8), budget=0.5)
    reason = learnt().check(site(queries=8, keys=8, layers=3))[0]
    assert reason == "its estimator is for (layers, heads, head size) = (2, 4, 16), here: (3, 4, 8)"
