"""Two processes do what one does: heads of the model shared, or texts. One torchrun for all of it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade import models
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.layout import Layout
from saccade.core.selection import Spans
from saccade.core.shard import WHOLE, Shard
from saccade.engines import parallel
from saccade.ops.ring_attend.api import pieces, ring_attend
from tests.engines import parallel_work as work

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.timeout(900)  # the first test waits for both processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that two processes can share, and one that they cannot; the same folder for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    at = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "parallel"
    with FileLock(f"{at}.lock"):
        if not at.exists():
            _fill(at)
    return at


def _fill(at):
    models.tiny("llama", heads=work.HEADS, kv_heads=work.KV_HEADS, head_size=work.SIZE).save_pretrained(at / "model")
    models.tiny("llama", heads=3, kv_heads=1).config.save_pretrained(at / "uneven")


@pytest.fixture(scope="module")
def found(folder):
    """What two processes came to, started once."""
    with FileLock(f"{folder}.lock"):
        if not (folder / "found.pt").exists():
            _start(folder)
    return torch.load(folder / "found.pt", weights_only=True)


def _start(folder):
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", work.__file__]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stderr[-4000:], pytrace=False)


@pytest.fixture(scope="module")
def model(folder):
    return work.alone(folder)


@pytest.fixture(scope="module")
def written(model):
    """What one process writes, asked for once."""
    return functools.cache(lambda name: work.written(name, model))


@pytest.mark.parametrize("name", work.METHODS)
def test_heads_of_the_model_shared(found, written, name):
    (tokens, logits, table, _), expected = found["tensor"][name], written(name)
    assert torch.equal(tokens, expected[0]) and torch.equal(table, expected[2])
    assert_close(logits, expected[1])


@pytest.mark.parametrize("name", work.BY_HEADS)
def test_texts_shared_by_heads(found, written, name):
    (tokens, logits, *_), expected = found["heads"][name], written(name)
    assert torch.equal(tokens, expected[0])
    assert_close(logits, expected[1])


@pytest.mark.parametrize("way, names", [("tensor", ("full", "quest", "streaming")), ("heads", ("full", "tova"))])
def test_of_the_cache_each_process_holds_its_part(found, written, way, names):
    for name in names:
        mine, whole = found[way][name][3], written(name)[3]
        assert abs(2 * mine - whole) <= 0.1 * whole, f"{name}: {mine} of {whole} bytes"


@pytest.mark.parametrize("way, name", [("heads", n) for n in work.TRAINED] + [("ring", n) for n in work.RINGS])
def test_forward_and_backward_of_a_shared_text(found, model, way, name):
    (loss, gradients, logits, kept), expected = found[f"{way}, trained"][name], work.trained(name, model)
    assert_close([loss, gradients, logits], expected[:3])
    assert kept < 0.6 * expected[3], "half of what is held for the backward, and what does not grow with the text"


def test_what_cannot_be_shared_is_refused_in_words(found):
    said = found["said"]
    uneven = "3 query heads cannot be shared out evenly among 2 processes"
    assert uneven in said["load"] and "Start as many processes as divide both numbers." in said["load"]
    assert "4 query heads cannot be shared out evenly among 3 processes" in said["attach"]
    assert "its heads are shared among 2 processes; calibrate in one" in said["calibrate"]
    assert "quest chooses by what queries and keys hold" in said["ring"]
    assert "keys and values that went round are kept nowhere" in said["ring cache"]
    assert "retrieval-head looks on at the model's own attention" in said["probe"]


def test_weights_shared_in_training_by_fsdp(found, tmp_path):
    """As `accelerate launch` with FSDP does it; broken off after step 3, it goes on from the checkpoint of step 2."""
    assert found["weights"]["steps"] == [1, 2, 3, 3, 4]
    one = work.loop.run(work.cell(tmp_path, work.Accelerator(cpu=True), lambda step, loss: None))["losses"]
    assert_close(torch.tensor(found["weights"]["losses"]).double(), torch.tensor(one).double())


# --- in one process ---------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_pieces_of_a_ring_make_up_the_selection(data):
    tokens, ranks = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 5))
    sinks, window, folded = data.draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens + 2), st.booleans()))
    layout, seen = Layout(tokens, 0, ranks, folded), torch.zeros(tokens, tokens, dtype=torch.long)
    chunks = [chunk for rank in range(ranks) for chunk in layout.chunks(rank)]
    for queries, keys in [(a, b) for a in chunks for b in chunks]:
        for piece in pieces(queries, keys, sinks, window):
            mask = piece.selection.mask()[0, 0].long()
            places = (queries[0], piece.queries), (keys[0], piece.keys)
            rows, columns = (slice(at + first, at + last) for at, (first, last) in places)
            seen[rows, columns] += mask.flip(0, 1) if piece.backwards else mask
    one = torch.ones(1, dtype=torch.long)
    expected = Spans(sinks=sinks * one, window=window * one, queries=tokens, keys=tokens).mask()[0, 0]
    assert torch.equal(seen, expected.long())


@given(tokens=st.integers(1, 30), ranks=st.integers(1, 6), folded=st.booleans())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_a_text_is_cut_and_joined(tokens, ranks, folded):
    text, each = torch.arange(tokens)[None], [Layout(tokens, rank, ranks, folded) for rank in range(ranks)]
    parts = [layout.cut(text, 1) for layout in each]
    assert torch.equal(each[0].join(parts, 1), text)
    assert [part.shape[1] for part in parts] == each[0].counts
    assert max(each[0].counts) - min(each[0].counts) <= 2


def test_a_shard_takes_its_part():
    heads = torch.arange(6)[None]
    assert [Shard(rank, 3).mine(heads, 1).tolist() for rank in range(3)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert WHOLE.mine(heads, 1) is heads and WHOLE.gather(heads, 1) is heads


def test_a_ring_refuses_what_it_cannot_compute():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    layout, many = Layout(6, 0, 2), torch.full((4,), 6)
    with pytest.raises(BadInput, match="query heads of one key/value head see different tokens"):
        ring_attend(q, k, k, Spans(sinks=torch.arange(4), window=many, queries=6, keys=6), layout)
    with pytest.raises(BadInput, match=r"more than first tokens and a causal window\. Share heads among the processes"):
        ring_attend(q, k, k, Spans(sinks=many, window=many, dilation=2, queries=6, keys=6), layout)
    with pytest.raises(BadInput, match=r"the selection is for 5 queries over 6 keys\. Make it for the whole text"):
        ring_attend(q, k, k, Spans(sinks=many, window=many, queries=5, keys=6), layout)
    with pytest.raises(BadInput, match=r"rank 0 has 3 queries and 3 keys, and its share is 4\. Cut the text"):
        ring_attend(q, k, k, Spans(sinks=many, window=many, queries=8, keys=8), Layout(8, 0, 2))


def test_sharing_a_text_needs_processes():
    with pytest.raises(CannotRun, match=r"there is no group of processes\. Start with torchrun"), parallel.sequence():
        pass
    said = r"sequence\('tree'\): a text is shared by 'heads' or in a 'ring'"
    with pytest.raises(BadOption, match=said), parallel.sequence("tree"):
        pass


@pytest.mark.parametrize("name", ["quest", "minference"])
def test_weights_on_the_disk(folder, written, name):
    """A method that is calibrated is found by weights that are there."""
    places = dict.fromkeys(["model.rotary_emb", "model.layers.0", "model.norm"], "cpu")
    places |= dict.fromkeys(["model.embed_tokens", "model.layers.1", "lm_head"], "disk")
    model = work.alone(folder, device_map=places, offload_folder=folder / name)
    assert "meta" in {parameter.device.type for parameter in model.parameters()}
    assert all(torch.equal(x, y) for x, y in zip(work.written(name, model), written(name)))


def test_where_a_model_lies_is_said_once(folder):
    load = models.load
    with pytest.raises(BadOption, match="load with device and device_map: each says where the model lies"):
        load(folder / "model", device="cpu", device_map="auto")
    with pytest.raises(BadOption, match="tp_plan='rowwise': 'auto' is the plan that a model brings along"):
        load(folder / "model", tp_plan="rowwise")
    with pytest.raises(BadOption, match="nothing is put there without a device_map"):
        load(folder / "model", offload_folder=folder)
    with pytest.raises(CannotRun, match=r"this is one process\. Start it with torchrun"):
        load(folder / "model", tp_plan="auto")


def test_a_known_model_that_cannot_be_shared_is_called_by_its_name(folder, monkeypatch):
    monkeypatch.setattr("saccade.models.loading.is_cached", lambda name: True)
    monkeypatch.setattr("saccade.models.loading.folder", lambda name: folder / "model")
    with pytest.raises(CannotRun, match=r"^load 'smollm2' with tp_plan='auto': this is one process"):
        models.load("smollm2", tp_plan="auto")
