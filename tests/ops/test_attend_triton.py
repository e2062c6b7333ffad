"""attend by Triton against float64: in Triton's interpreter on a CPU (small shapes), and on a CUDA device, both ways,
at every head size, dtype and kind of selection that it takes."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.errors import CannotRun
from saccade.core.selection import Blocks, Buckets, PerHead, Selection, dense
from saccade.ops.attend.triton import lists as kernel_lists
from tests.helpers import TURNS, assert_within_largest, error, exact_attention, rounding
from tests.ops._triton import CHILD, interpreter, run_in_interpreter
from tests.ops.shapes import FREE, HEAD_SIZES, build, free, tensors

KINDS = ("blocks", "gather", "lines", "spans", "buckets", "others", "perhead")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = (torch.float32, torch.float16)  # the interpreter cuts numbers off to bfloat16, where a device rounds


def test_in_the_interpreter():
    run_in_interpreter(__file__)


# --- the yardstick --------------------------------------------------------------------------------------------------


def plain(q, k, v, mask, scale, softcap):
    """Attention in plain PyTorch in the dtype of q: what an error may be twice of. Rows that see nothing give zeros."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    blank = ~mask.any(-1, keepdim=True)
    logits = logits.masked_fill(~(mask | blank), -torch.inf)
    return (logits.softmax(-1) @ v).masked_fill(blank, 0.0), logits.logsumexp(-1)


def results(attention, inputs, mask, with_lse=True):
    """out, lse (zero where it is -inf) and the gradients of sum(weights * out) + sum(lse)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = attention(*inputs)
    seen = mask.any(-1).expand(lse.shape)
    weights = torch.randn(out.shape, generator=rng.generator("weights", 0, *out.shape)).to(out)
    total = (out.double() * weights).sum()
    if with_lse:
        total = total + torch.where(seen, lse, 0.0).double().sum()
    found = [out, torch.where(seen, lse, 0.0), *torch.autograd.grad(total, inputs)]
    return [x.detach() for x in found]


def check(
    selection, inputs, *, softcap=None, scale=None, device="cpu", layout=lambda x: x, with_lse=True, impl="triton"
):
    """Values and gradients are at most twice as wrong as PyTorch's."""
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    inputs = [x.to(device) for x in inputs]
    mask, there = selection.mask().to(device), moved(selection, device)
    said = []

    def ours(q, k, v):
        out, lse = ops.attend(q, k, v, there, softcap=softcap, scale=scale, impl=impl, report=said.append)
        assert bool((lse[~mask.any(-1).expand(lse.shape)] == -torch.inf).all()), "lse of rows that see nothing"
        return out, lse

    mine = results(ours, [layout(x) for x in inputs], mask, with_lse)
    assert said == [f"attend:{impl}"] and mine[0].dtype == inputs[0].dtype and mine[1].dtype == torch.float32

    def right(seen):
        wide = [x.double() for x in inputs]
        return results(lambda *x: exact_attention(*x, seen, softcap=softcap, scale=scale), wide, seen, with_lse)

    def theirs(seen, turn):
        def turned(q, k, v):
            return plain(q.roll(turn, -1), k.roll(turn, -1), v, seen, scale, softcap)

        return results(turned, inputs, seen, with_lse)

    def bounds():
        yield [rounding(e, inputs[0].dtype) for e in exact]
        for seen in (mask, torch.ones_like(mask)):
            truth = exact if seen is mask else right(seen)
            for turn in TURNS:
                yield [error(x, e) for x, e in zip(theirs(seen, turn), truth)]

    exact = right(mask)
    assert_within_largest(dict(zip(("out", "lse", "dq", "dk", "dv"), mine)), exact, bounds())


def moved(s: Selection, device) -> Selection:
    """Its tensors there."""
    if isinstance(s, PerHead):
        return dataclasses.replace(s, parts=tuple((h.to(device), moved(part, device)) for h, part in s.parts))
    return dataclasses.replace(s, **{n: x.to(device) for n, x in vars(s).items() if isinstance(x, torch.Tensor)})


# --- in the interpreter ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _within_the_tensors(monkeypatch):
    """In the interpreter no kernel may read or write beside the tensors that it was given."""
    if not CHILD:
        return
    from triton.runtime import interpreter as own

    given, call = [], own.GridExecutor.__call__

    def noted(self, *args, **options):
        storages = [x.untyped_storage() for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        given[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return call(self, *args, **options)

    def watched(name, pointers, mask):
        real = getattr(own.InterpreterBuilder, name)

        def wrapper(self, *args, **options):
            at, use = np.broadcast_arrays(args[pointers].data, args[mask].data.astype(bool))
            inside = np.zeros(at.shape, dtype=bool)
            for first, end in given:
                inside |= (at >= first) & (at < end)
            assert (inside | ~use).all(), f"{name} beside the tensors"
            return real(self, *args, **options)

        monkeypatch.setattr(own.InterpreterBuilder, name, wrapper)

    monkeypatch.setattr(own.GridExecutor, "__call__", noted)
    watched("create_masked_load", 0, 1)
    watched("create_masked_store", 0, 2)
    watched("create_atomic_rmw", 1, 3)


@st.composite
def cases(draw):
    """(b, h, g, selection), small: the interpreter takes seconds for a few hundred tokens."""
    kind = draw(st.sampled_from(KINDS))
    keys = draw(st.integers(2, 70))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    g, group, b = draw(st.integers(1, 2)), draw(st.sampled_from([2, 3])), draw(st.sampled_from([1, 1, 2]))
    heads = g * group if kind == "perhead" else draw(st.sampled_from([1, g * group]))
    block, seed = draw(st.sampled_from([16, 32, 64, 128])), 2 * draw(st.integers(0, 40))  # even: no dilation
    rows, causal = draw(st.sampled_from([1, b])), draw(st.booleans())
    return b, g * group, g, build(kind, rows, heads, queries, keys, causal, seed, block)


@interpreter
@settings(
    max_examples=6,
    phases=[Phase.explicit, Phase.generate],  # a failure is not made smaller: that takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cases(), st.sampled_from(EXACT), st.sampled_from([None, 5.0]), st.sampled_from([None, 0.3]))
def test_values_and_gradients(case, dtype, softcap, scale):
    b, h, g, selection = case
    inputs = tensors(b, h, g, selection.queries, selection.keys, 16, dtype)
    check(selection, inputs, softcap=softcap, scale=scale)


@interpreter
@pytest.mark.parametrize("kind", FREE[:-1])
def test_more_queries_than_keys(kind):
    selection = free(kind)
    check(selection, tensors(1, 2, 1, selection.queries, selection.keys, 16))


@interpreter
@pytest.mark.parametrize(
    "q_block, k_block, causal",
    [(64, 64, True), (64, 64, False), (128, 64, True), (64, 128, False), (16, 64, True), (8, 8, False), (48, 24, True)],
)
def test_blocks_of_any_size(q_block, k_block, causal):
    selection = blocks(1, 70, 135, q_block, k_block, causal)
    check(selection, tensors(1, 1, 1, 70, 135, 16))


def blocks(heads, queries, keys, q_block, k_block, causal=True, share=0.6):
    """Random blocks; rows that see nothing occur."""
    shape = (1, heads, -(-queries // q_block), -(-keys // k_block))
    keep = torch.rand(shape, generator=rng.generator("keep", 0, *shape)) < share
    return Blocks.of(keep, queries=queries, keys=keys, q_block=q_block, k_block=k_block, causal=causal)


@interpreter
@pytest.mark.parametrize("sizes, dtype", [((40, 3, 90), torch.float32), ((1, 2, 3, 60), torch.float16)])
@pytest.mark.parametrize("kind", ["causal", "free", "others"])
def test_buckets_of_any_size(sizes, dtype, kind):
    """Larger and smaller than a tile, also of keys that no query asks for; with orders given, some keys left out."""
    n = sum(sizes)
    bucket = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    mixed = torch.stack([torch.randperm(n, generator=rng.generator("mixed", i)) for i in range(4)])
    q_bucket, k_bucket = bucket[mixed][None, :, -n // 2 :], bucket[mixed.flip(0)][None]
    order = k_bucket.sort(stable=True).indices
    if kind == "others":
        order = order[..., n // 8 :]
        k_bucket = torch.full_like(k_bucket, -1).scatter(-1, order, k_bucket.gather(-1, order))
    shape = {"queries": q_bucket.shape[-1], "keys": n, "causal": kind == "causal", "family": 2 * (kind == "others")}
    selection = Buckets(q_bucket=q_bucket, k_bucket=k_bucket, k_order=order, **shape)
    check(selection, tensors(1, 4, 2, shape["queries"], n, 16, dtype))


@interpreter
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("asked", [False, True])
def test_lists_of_lines_are_those_of_the_selection(block, seed, asked, monkeypatch):
    """Where the host asks for the largest count, and where the table has room for any."""
    from saccade.ops.attend.triton import lines

    monkeypatch.setattr(lines, "FEW_RUNS", 0 if asked else lines.FEW_RUNS)
    s = build("lines", 1, 2, 110, 140, True, seed, block)
    count, runs, columns, bits = lines.drawn(s, torch.device("cpu"))
    assert runs.shape[-1] == max(1, int(count.max())) if asked else runs.shape[-1] >= int(count.max())
    tiles, lists = s.tiles(), s.gather().index
    assert torch.equal(count, (tiles >= 0).sum(-1).int())
    for at in itertools.product(range(2), range(count.shape[-1])):
        mine, wanted = runs[0][at][: count[0][at]], tiles[0][at]
        assert torch.equal(mine, wanted[wanted >= 0])
        place = torch.arange(columns.shape[-1])
        used = columns[0, at[0], 0][(bits[0][at][place // 32] >> (place % 32)) & 1 > 0]
        assert sorted(used.tolist()) == sorted(lists[0][at][lists[0][at] >= 0].tolist())


@interpreter
@pytest.mark.parametrize("size", [16, 20, 48])
def test_head_sizes_that_are_no_power_of_two_and_values_of_another_size(size):
    q, k, _ = tensors(1, 2, 1, 20, 40, size)
    v = tensors(1, 2, 1, 20, 40, 32)[2]
    check(build("lines", 1, 2, 20, 40, True, 3, 16), [q, k, v])


@interpreter
def test_heads_of_a_group_with_the_same_lists_are_taken_together():
    one = build("gather", 1, 1, 20, 50, True, 3, 4)
    shared = dataclasses.replace(one, index=one.index.expand(1, 6, -1, -1), ranges=one.ranges.expand(1, 6, -1, -1, -1))
    q, k, v = tensors(1, 6, 2, 20, 50, 16)
    assert [x.pack for x in kernel_lists.listed(shared, q, 3)] == [3]
    own = build("gather", 1, 6, 20, 50, True, 3, 4)
    assert [x.pack for x in kernel_lists.listed(own, q, 3)] == [1]
    check(shared, [q, k, v])


@interpreter
def test_a_nan_stays_and_strided_inputs_change_nothing():
    selection = build("blocks", 1, 4, 60, 60, True, 3, 32)
    q, k, v = tensors(1, 4, 2, 60, 60, 16)
    check(selection, [q, k, v], layout=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    check(selection, [q, k, v], layout=lambda x: torch.stack([x, x], -1)[..., 0])
    v[0, 0, 0, 0] = torch.nan
    out, _ = ops.attend(q, k, v, selection, impl="triton")
    assert torch.equal(out[:, :2, :, 0].isnan(), (selection.mask()[:, :2, :, 0]))


# --- on any machine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [1, 4])
def test_transposed_lists_are_the_table_transposed(h):
    selection = blocks(h, 500, 700, 64, 128)
    first, rows = kernel_lists.turned(kernel_lists.listed(selection, torch.empty(1, 4, 500, 16), 2)[0])
    table = torch.zeros_like(selection.table())
    for j in range(h):
        for c in range(table.shape[-1]):
            table[0, j, rows[0, j, first[0, j, c] : first[0, j, c + 1]].long(), c] = True
    assert torch.equal(table, selection.table())


REASONS = {
    "Triton": lambda q: (q, dense(8, 8), None),
    "the inputs are float64": lambda q: (q.double(), dense(8, 8), None),
    "heads of 8; it takes 16 to 256": lambda q: (q[..., :8], dense(8, 8), None),
    "a scale of -1; it takes positive ones": lambda q: (q, dense(8, 8), -1.0),
    "the selection is of pairs": lambda q: (q, build("pairs", 1, 4, 8, 8, True, 0, 2), None),
    "the selection is a dilated window": lambda q: (q, build("spans", 1, 4, 8, 8, True, 1, 2), None),
}


@pytest.mark.parametrize("text", REASONS)
def test_it_says_why_it_cannot(text):
    if CHILD and text == "Triton":
        pytest.skip("the interpreter takes CPU tensors")
    q, selection, scale = REASONS[text](tensors(1, 4, 2, 8, 8, 32)[0])
    with pytest.raises(CannotRun) as caught:
        ops.attend(q, q[:, :2], q[:, :2], selection, scale=scale, impl="triton")
    assert text in str(caught.value)


@interpreter
def test_single_keys_on_top_of_what_runs_gave():
    """As the warp-specialised form has it done: the same as both at once, but for one more rounding."""
    from saccade.ops.attend.triton import launch
    from saccade.ops.attend.triton.lists import listed

    q, k, v = tensors(1, 2, 1, 40, 60, 32, torch.float16)
    (both,) = listed(build("lines", 1, 2, 40, 60, True, 3, 16), q, 2)
    out, lse, _ = launch.forward(q, k, v, [both], 0.2, None)
    runs = dataclasses.replace(both, index=None, bits=None)
    single = dataclasses.replace(both, count=None, col=None)
    parts, parts_lse, _ = launch.forward(q, k, v, [runs], 0.2, None)
    launch._over_keys(q, k, v, None, parts, parts_lse, None, None, None, None, single, 0.2, None, start=True)
    torch.testing.assert_close(parts_lse, lse)
    torch.testing.assert_close(parts, out, rtol=0, atol=float(2 * torch.finfo(q.dtype).eps * out.abs().max()))


# --- on a CUDA device -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_on_a_gpu(kind, size, dtype):
    selection = build(kind, 1, 4, 430, 517, True, 4, 128)
    inputs = tensors(2, 4, 2, 430, 517, size, dtype)
    if dtype == torch.float32 and size > 128:
        with pytest.raises(CannotRun, match="gradients in float32"):
            check(selection, inputs, device="cuda")
    else:
        check(selection, inputs, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FREE[:-1])
def test_more_queries_than_keys_on_a_gpu(kind):
    selection = free(kind, 700, 130)
    for dtype in DTYPES:
        check(selection, tensors(1, 2, 1, 700, 130, 64, dtype), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ("blocks", "spans", "perhead"))
@pytest.mark.parametrize("size", (64, 128))
def test_whole_tiles_on_a_gpu(kind, size):
    """Those that come by tensor descriptors, and key blocks that so many look at that their sums are put together."""
    selection = build(kind, 1, 8, 1280, 1280, True, 4, 128)
    for dtype in (torch.bfloat16, torch.float16):
        check(selection, tensors(2, 8, 2, 1280, 1280, size, dtype), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
def test_blocks_that_many_look_at_on_a_gpu(block):
    first = torch.eye(2560 // block, dtype=torch.bool)
    first[:, 0] = True
    selection = Blocks.of(first[None, None], queries=2560, keys=2560, q_block=block, k_block=block)
    check(selection, tensors(1, 4, 2, 2560, 2560, 64, torch.bfloat16), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal, softcap", [(False, None), (True, 5.0)])
def test_softcap_and_no_causality_on_a_gpu(kind, causal, softcap):
    selection = build(kind, 2, 4, 430, 517, causal, 6, 64)
    for dtype in (torch.float32, torch.bfloat16):
        check(selection, tensors(2, 4, 2, 430, 517, 64, dtype), softcap=softcap, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "q_block, k_block", [(64, 64), (128, 128), (128, 64), (64, 128), (16, 16), (256, 128), (2, 64)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_any_size_on_a_gpu(q_block, k_block, causal):
    for heads in (1, 8):
        selection = blocks(heads, 1000, 1100, q_block, k_block, causal)
        check(selection, tensors(1, 8, 2, 1000, 1100, 128, torch.bfloat16), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
@pytest.mark.parametrize("block, heads, queries", [(32, 9, 2048), (32, 1, 2048), (16, 9, 512), (16, 1, 2047)])
def test_narrow_blocks_on_a_gpu(block, heads, queries, layout):
    """Shapes of SmolLM2, whose heads are shared by three, with a cache and without. Without what `unclaimed` does,
    rows of 2,048 queries that hold the diagonal saw too few keys, or too many."""
    selection = blocks(heads, queries, 2048, block, block, share=0.1)
    check(selection, tensors(1, 9, 3, queries, 2048, 64, torch.bfloat16), device="cuda", layout=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_memory_and_strided_inputs_on_a_gpu(kind):
    selection = build(kind, 1, 4, 300, 300, True, 4, 64)
    inputs = tensors(2, 4, 2, 300, 300, 128, torch.bfloat16)
    for layout in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.stack([x, x], -1)[..., 0]):
        poison = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(20)]
        del poison  # its memory is given out again
        check(selection, inputs, device="cuda", layout=layout)


@pytest.mark.gpu
def test_it_is_what_auto_takes_on_a_gpu():
    said = []
    q, k, v = (x.cuda() for x in tensors(1, 4, 2, 64, 64, 64, torch.bfloat16))
    ops.attend(q, k, v, dense(64, 64), report=said.append)
    ops.attend(q, k, v, moved(build("pairs", 1, 4, 64, 64, True, 0, 2), "cuda"), report=said.append)
    assert said == ["attend:triton", "attend:torch"]
