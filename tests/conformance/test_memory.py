"""Properties 12 and 14: nothing is read that was not written, any strides and dtypes do, and bytes are counted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from saccade.attach.compat import CACHE
from saccade.attach.engine import Engine
from saccade.attach.layer import WatchedLayer
from saccade.attach.run import Run
from saccade.attach.store import SPARE
from saccade.attach.watch import Watcher
from tests.conformance.cases import drawn, tiny, trials
from tests.conformance.runs import Padded, assert_same, read
from tests.methods.handmade import in_pieces

FRESH = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))


def poisoned(make):
    """The same function, whose memory holds the worst there is."""

    def fill(*args, **options):
        fresh = make(*args, **options)
        if fresh.is_meta or not fresh.numel():
            return fresh
        if fresh.dtype.is_floating_point:
            return fresh.fill_(torch.nan)
        return fresh.fill_(fresh.dtype == torch.bool or torch.iinfo(fresh.dtype).max)

    return fill


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fresh memory holds NaN, the largest integer, True."""
    with contextlib.ExitStack() as stack:
        for owner, name in FRESH:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def test_12_the_poison_works():
    """Else the next test tests nothing."""
    like = torch.zeros(2)
    with poison():
        fresh = [torch.empty(2), torch.empty_like(like), torch.empty_strided((2,), (3,)), like.new_empty(2)]
        assert all(x.isnan().all() for x in fresh)
        assert torch.empty(1, dtype=torch.int32) == 2**31 - 1 and torch.empty(1, dtype=torch.bool)


@pytest.mark.claims("memory")
@drawn()
def test_12_fresh_memory_is_written_before_it_is_read(case, data):
    """Bit for bit the same under poison, for two rows of a batch; and where rows are padded, also at the padding."""
    trial = data.draw(trials(case))
    ids = trial.ids(rows=2)
    padded = Padded.of([ids[0], ids[1, :5], ids[1, :0]], "left")
    clean, clean_padded = read(trial, ids), read_prompt(trial, padded)
    with poison():
        assert torch.equal(read(trial, ids), clean)
        assert torch.equal(read_prompt(trial, padded), clean_padded)


@torch.no_grad()
def read_prompt(trial, rows):
    """Logits of every slot of a padded prompt."""
    with trial.attach():
        return trial.model(rows.ids, attention_mask=rows.real.long(), position_ids=rows.position).logits


@pytest.mark.claims("memory")
@drawn()
def test_12_strided_inputs_do(owner, data):
    """Queries, keys and values as every second number of a wider tensor, with NaN between."""
    trial = data.draw(trials(owner))
    owner, name = (Watcher, "after") if "observe" in owner.parts else (Engine, "forward")
    plain = getattr(owner, name)

    def forward(self, layer, q, k, v, *rest):
        q, k, v = (torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in (q, k, v))
        assert not q.is_contiguous()
        return plain(self, layer, q, k, v, *rest)

    expected, noted = read(trial, trial.ids()), noted_of(trial)
    with mock.patch.object(owner, name, forward):
        assert_same(read(trial, trial.ids()), expected, trial)
        assert noted_of(trial) == noted


def noted_of(trial):
    """What a probe's table says; nothing of other methods."""
    if "observe" not in trial.method.parts:
        return []
    with trial.attach() as run:
        in_pieces(trial.model, trial.ids(), [trial.prompt])
    return run.result()


@pytest.mark.claims("memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@drawn(1)
def test_12_the_dtype_stays(case, dtype, data):
    """Of the logits, and of the keys and values that are stored."""
    trial = data.draw(trials(case))
    trial = dataclasses.replace(trial, model=tiny(*trial.heads, dtype))
    with trial.attach(), torch.no_grad():
        out = trial.model(trial.ids()[:, : trial.prompt], use_cache=True)
        logits = trial.model(trial.ids()[:, trial.prompt :], **{CACHE: out[CACHE]}).logits
        stored = [x for layer in out[CACHE].layers for x in keys_and_values(layer)]
    assert {x.dtype for x in (out.logits, logits, *stored)} == {dtype}
    assert out.logits.isfinite().all() and logits.isfinite().all()


def keys_and_values(layer):
    """All of them, wherever a cache layer has them."""
    if isinstance(layer, WatchedLayer):
        return [layer.keys, layer.values]
    return [b.columns[name] for b in layer.store.buckets for name in ("keys", "values")]


@pytest.mark.claims("bytes")
@drawn()
def test_14_bytes_reported_are_bytes_held(case, data):
    """Every tensor that can be reached from the cache's layers, after the prompt and after each of two forwards."""
    trial, rows = data.draw(trials(case)), data.draw(st.integers(1, 3))
    ids, n = trial.ids(rows), trial.prompt
    with trial.attach() as run, torch.no_grad():
        cache = trial.model(ids[:, :n], use_cache=True)[CACHE]
        assert run.record.bytes_held == reachable(cache)
        for part in (ids[:, n : n + 1], ids[:, n + 1 :]):
            trial.model(part, **{CACHE: cache})
            assert run.record.bytes_held == reachable(cache)


@pytest.mark.claims("bytes")
@drawn(1)
def test_14_at_the_peak_of_a_prompt_one_layer_is_whole(owner, data):
    """A layer holds what it will hold before the next one is computed."""
    trial, held = data.draw(trials(owner)), []
    with trial.attach() as run, torch.no_grad(), contextlib.ExitStack() as stack:
        cache = run.new_cache()
        for mine, layer in zip(cache.layers, trial.model.model.layers):
            hook = layer.register_forward_hook(lambda *_, mine=mine: held.append(mine.bytes_held()))
            stack.callback(hook.remove)
        trial.model(trial.ids()[:, : trial.prompt], **{CACHE: cache})
        assert held == [layer.bytes_held() for layer in cache.layers]


def reachable(cache) -> int:
    """Bytes of the storages of all tensors under the cache's layers; a run and its engines are not the cache's."""
    found, waiting, seen = {}, [cache.layers], set()
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (Engine, Run)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif type(thing).__module__.startswith("saccade."):
            waiting.append(vars(thing))
    return sum(found.values())


@pytest.mark.claims("bytes")
@drawn()
def test_14_what_was_dropped_is_given_back(case, data):
    """Nothing holds on to more than the kept keys and values, their positions, columns beside them, and the room that
    rows which grow have for a few more."""
    trial = data.draw(trials(case))
    with trial.attach() as run:
        in_pieces(trial.model, trial.ids(), [trial.prompt])
        if "evict" not in case.parts:
            assert run.record.kept_fraction == 1
            return
        beside = 8 * getattr(trial.method, "tallies", False)
        for layer in run.record.layers.values():
            kept = sum(len(p) for p in layer.kept[0])
            needed = kept * (2 * trial.heads[2] * 8 + 4 + beside)
            assert 0 <= layer.bytes_held - needed <= 64 * trial.heads[1] + needed / SPARE
