"""attend over every kind of selection, against float64 under `selection.mask()`; errors by their texts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from saccade import ops
from saccade.core import rng
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.selection import Blocks, Pairs, PerHead, Selection, Spans, Together, causal_mask, dense
from saccade.ops.attend import flex
from saccade.ops.attend.tiles import shares
from tests.helpers import (
    KERNELS,
    TURNS,
    assert_close_as_torch,
    assert_no_worse,
    assert_within_largest,
    error,
    exact_attention,
    rounding,
    torch_attention,
)
from tests.ops.shapes import FREE, HEAD_SIZES, KINDS, build, free, selections, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(attention, inputs, selection: Selection, with_lse: bool):
    """of sum(weights * out) (+ sum of the finite lse)."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = attention(*inputs)
    weights = torch.randn(out.shape, generator=rng.generator("weights", 0, *out.shape))
    total = (out * weights.to(out.dtype)).sum()
    if with_lse:
        total = total + torch.where(selection.mask().any(-1), lse, 0.0).sum().to(total.dtype)
    return torch.autograd.grad(total, inputs)


@given(selections(), st.sampled_from(DTYPES), st.sampled_from([None, 5.0]), st.sampled_from([None, 0.3]))
def test_forward_is_as_right_as_torch(case, dtype, softcap, scale):
    b, h, g, selection = case
    q, k, v = tensors(b, h, g, selection.queries, selection.keys, 32, dtype)
    out, lse = ops.attend(q, k, v, selection, softcap=softcap, scale=scale)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close_as_torch(out, q, k, v, selection.mask(), softcap=softcap, scale=scale, lse=lse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_both_ways_at_every_head_size(kind, size, softcap):
    selection = build(kind, 1, 4, 150, 190, True, 3, 64)
    inputs = tensors(1, 4, 2, selection.queries, selection.keys, size)
    out, lse = ops.attend(*inputs, selection, softcap=softcap)
    assert_close_as_torch(out, *inputs, selection.mask(), softcap=softcap, lse=lse)
    _same_gradients(inputs, selection, softcap, True)


@given(selections(120, least=8), st.booleans())
def test_gradients_are_as_right_as_torch(case, with_lse):
    b, h, g, selection = case
    _same_gradients(tensors(b, h, g, selection.queries, selection.keys, 32), selection, None, with_lse)


def _same_gradients(inputs, selection, softcap, with_lse):
    ours = gradients(lambda *x: ops.attend(*x, selection, softcap=softcap), inputs, selection, with_lse)
    seen = selection.mask()

    def right(mask):
        wide = [x.double() for x in inputs]
        return gradients(lambda *x: exact_attention(*x, mask, softcap=softcap), wide, selection, with_lse)

    def bounds():
        """Errors of PyTorch's kernels under the mask and without."""
        for mask in (seen, torch.ones_like(seen)):
            truth = exact if mask is seen else right(mask)
            yield [rounding(e, torch.float32) for e in truth]
            for backend, turn in itertools.product(KERNELS, TURNS):
                found = gradients(_theirs(mask, softcap, backend, turn), inputs, selection, with_lse)
                yield [error(f, e) for f, e in zip(found, truth)]

    exact = right(seen)
    assert_within_largest(dict(zip(("dq", "dk", "dv"), ours)), exact, bounds())


def _theirs(mask, softcap, backend, turn):
    blank = mask.any(-1, keepdim=True)  # PyTorch's gradient is NaN where a row sees nothing: it may see all

    def attention(q, k, v):
        q, k = q.roll(turn, -1), k.roll(turn, -1)
        out, lse = torch_attention(q, k, v, mask | ~blank, softcap=softcap, backend=backend)
        return out * blank, torch.where(blank[..., 0], lse, 0.0)

    return attention


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(60, 700)), min_size=1, max_size=2),
    st.integers(66, 800),
    st.sampled_from(DTYPES),
)
def test_windows_that_are_views_into_the_keys(heads, n, dtype):
    sinks, window = torch.tensor(heads).repeat_interleave(2, 0).unbind(-1)
    selection = Spans(sinks=sinks, window=window, queries=n, keys=n)
    q, k, v = tensors(2, len(sinks), len(heads), n, n, 16, dtype)
    out, lse = ops.attend(q, k, v, selection)
    assert_close_as_torch(out, q, k, v, selection.mask(), lse=lse)


@given(selections())
def test_back_ends_agree_and_say_their_name(case):
    b, h, g, selection = case
    q, k, v = tensors(b, h, g, selection.queries, selection.keys, 32)
    said = []
    for impl in ("auto", "torch", "reference"):
        out, lse = ops.attend(q, k, v, selection, impl=impl, report=said.append)
        assert_close_as_torch(out, q, k, v, selection.mask(), lse=lse)
    assert said == ["attend:torch", "attend:torch", "attend:reference"]


def test_few_pairs_together_are_computed_under_one_mask():
    near = build("spans", 1, 4, 60, 60, True, 3, 16)
    far = Pairs(allowed=~near.mask() & causal_mask(60, 60), queries=60, keys=60)
    both = Together(parts=(near, far), times=(1.0, 1.0), queries=60, keys=60)
    inputs, said = tensors(1, 4, 2, 60, 60, 16), []
    out, lse = ops.attend(*inputs, both, report=said.append)
    assert said == ["attend:torch"]
    assert_close_as_torch(out, *inputs, both.mask(), lse=lse)


@pytest.mark.parametrize("size, of_values", [(24, 8), (8, 24), (16, 17)])
@pytest.mark.parametrize("with_lse", [False, True])
def test_values_of_another_size_than_keys(size, of_values, with_lse):
    selection = build("gather", 2, 4, 40, 50, True, 3, 16)
    q, k, v = (x.double() for x in tensors(2, 4, 2, 40, 50, max(size, of_values)))
    inputs = q[..., :size], k[..., :size], v[..., :of_values]
    ours = gradients(lambda *x: ops.attend(*x, selection), inputs, selection, with_lse)
    exact = gradients(lambda *x: exact_attention(*x, selection.mask()), inputs, selection, with_lse)
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(ops.attend(*inputs, selection)[0], exact_attention(*inputs, selection.mask())[0])


def test_a_nan_from_behind_stays_one():
    """PyTorch's kernel loses it under a mask."""
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 1, 30, 40, 16))
    out, _ = ops.attend(q, k, v, build("gather", 1, 2, 30, 40, True, 3, 16))
    found = torch.autograd.grad(out, (q, k, v), torch.full_like(out, torch.nan))
    assert all(x.isnan().any() for x in found)


@pytest.mark.parametrize("kind", FREE)
def test_more_queries_than_keys(kind):
    selection = free(kind)
    inputs = tensors(1, 2, 1, selection.queries, selection.keys, 16)
    out, lse = ops.attend(*inputs, selection)
    assert_close_as_torch(out, *inputs, selection.mask(), lse=lse)


def test_together_counts_its_pairs_as_often_as_it_says():
    near = build("buckets", 2, 4, 90, 110, False, 3, 16)
    shape = {"queries": 90, "keys": 110, "causal": False}
    far = Pairs(allowed=~near.mask() & build("pairs", 1, 1, 90, 110, False, 3, 16).mask(), **shape)
    both = Together(parts=(near, far), times=(1.0, 2.5), **shape)
    inputs = [x.double().requires_grad_() for x in tensors(2, 4, 2, 90, 110, 32)]
    k, v = (x.repeat_interleave(2, 1) for x in inputs[1:])
    logits = inputs[0] @ k.mT * 32**-0.5 + torch.where(near.mask(), 0.0, math.log(2.5))
    logits = logits.masked_fill(~both.mask(), -torch.inf)
    assert both.mask().any(-1).all()
    said = []
    found = ops.attend(*inputs, both, report=said.append)
    assert said == ["attend:torch"] * 2
    exact = logits.softmax(-1) @ v, logits.logsumexp(-1)
    torch.testing.assert_close(found, exact)
    for mine, theirs in zip(*(torch.autograd.grad(o.square().sum() + e.sum(), inputs) for o, e in (found, exact))):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_memory_and_strided_inputs_change_nothing(kind, monkeypatch):
    selection = build(kind, 1, 4, 100, 130, True, 5, 16)
    q, k, v = tensors(2, 4, 2, selection.queries, selection.keys, 32)
    expected = ops.attend(q, k, v, selection)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: _poisoned(real(*s, **o)))
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *s, **o: _poisoned(new(x, *s, **o)))
    layouts = (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.stack([x, x], -1)[..., 0])
    for strided in layouts:
        out, lse = ops.attend(strided(q), strided(k), strided(v), selection)
        assert_close_as_torch(out, q, k, v, selection.mask(), lse=lse)
    assert torch.equal(ops.attend(q, k, v, selection)[0], expected[0])


def _poisoned(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x


def test_threads_compute_the_same_and_leave_the_number_of_threads_alone():
    selection = build("blocks", 1, 4, 4200, 4200, True, 0, 64)
    q, k, v = tensors(1, 4, 2, 4200, 4200, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.attend(q, k, v, selection)
        torch.set_num_threads(2)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                two = ops.attend(q, k, v, selection)
            assert all(torch.equal(a, b) for a, b in zip(one, two))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_double_precision_is_kept():
    q, k, v = (x.double() for x in tensors(1, 2, 1, 40, 40, 32))
    out, lse = ops.attend(q, k, v, dense(40, 40))
    exact = exact_attention(q, k, v, dense(40, 40).mask())
    assert out.dtype == lse.dtype == torch.float64
    assert_no_worse(out, exact[0], [torch_attention(q, k, v, dense(40, 40).mask())[0]])


ERRORS = {
    "not all [batch, heads, tokens, size]": lambda q, k, v: ops.attend(q[0], k, v, dense(8, 8)),
    "must agree": lambda q, k, v: ops.attend(q, k, v[:, :, :5], dense(8, 8)),
    "the first is not a multiple of the second": lambda q, k, v: ops.attend(q[:, :3], k, v, dense(8, 8)),
    "k torch.float64 on cpu": lambda q, k, v: ops.attend(q, k.double(), v, dense(8, 8)),
    "the selection is for 9 queries over 9 keys": lambda q, k, v: ops.attend(q, k, v, dense(9, 9)),
    "the selection has 1 sequences and 3 heads, the queries 1 and 4": lambda q, k, v: ops.attend(
        q, k, v, Pairs(allowed=torch.ones(1, 3, 8, 8, dtype=torch.bool), queries=8, keys=8)
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_inputs_that_do_not_fit_are_refused(text):
    with pytest.raises(BadInput) as error:
        ERRORS[text](*tensors(1, 4, 2, 8, 8, 32))
    assert text in str(error.value)


def test_back_ends_that_are_not_there_are_refused():
    q, k, v = tensors(1, 4, 2, 8, 8, 32)
    with pytest.raises(BadOption, match="attend with impl='magic': there is no such back end"):
        ops.attend(q, k, v, dense(8, 8), impl="magic")
    with pytest.raises(CannotRun, match="attend with impl='triton'"):
        ops.attend(q, k, v, dense(8, 8), impl="triton")


def test_flex_says_every_reason_why_it_cannot():
    q, k, v = (x.double() for x in tensors(1, 4, 2, 64, 64, 8))
    with pytest.raises(CannotRun) as error:
        ops.attend(q, k, v, build("lines", 1, 4, 64, 64, True, 1, 16), impl="flex")
    for why in (
        "FlexAttention gives no gradient and no lse on a cpu device",
        "it computes in float32 at most, and the inputs are float64",
        "there are 64 queries; it takes 128 or more",
        "heads of 8; it takes 16 or more",
        "it takes blocks and causal spans; the selection is of lines",
    ):
        assert why in str(error.value)
    with pytest.raises(CannotRun, match="blocks of 16; its own are 128 wide"):
        ops.attend(q, k, v, build("blocks", 1, 4, 64, 64, True, 1, 16), impl="flex")


@pytest.mark.parametrize("kind", ["blocks", "spans"])
@pytest.mark.parametrize("keys, queries", [(512, 512), (700, 300)])
def test_the_block_lists_that_flex_is_given_are_the_selection(kind, keys, queries):
    """Uncompiled and on a CPU: what it lists as whole or in part, and its rule, without the kernel."""
    selection = _for_flex(kind, queries, keys)
    mask = (flex._blocks if kind == "blocks" else flex._spans)(selection, torch.device("cpu"))
    wanted = selection.mask()
    b, h, _, _ = wanted.shape
    index = torch.meshgrid(*(torch.arange(n) for n in (b, h, queries, keys)), indexing="ij")
    assert torch.equal(mask.mask_mod(*index), wanted)
    size = mask.BLOCK_SIZE
    wide = [_unlisted(*lists, size, wanted.shape) for lists in _lists(mask)]
    assert not (wide[0] & wide[1]).any()
    assert torch.equal((wide[0] & wanted) | wide[1], wanted)
    assert not (wide[1] & ~wanted).any()


def _lists(mask):
    return (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)


def _unlisted(count, index, size, shape):
    table = torch.zeros(index.shape, dtype=torch.bool)
    listed = torch.arange(index.shape[-1]) < count[..., None]
    table.scatter_(-1, index.long(), listed)
    return table.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[:, :, : shape[2], : shape[3]]


def _for_flex(kind: str, queries: int, keys: int) -> Selection:
    if kind == "spans":
        sinks, window = torch.tensor([0, 5, 130, 1]), torch.tensor([keys, 1, 100, 300])
        return Spans(sinks=sinks, window=window, queries=queries, keys=keys)
    nqb, nkb = -(-queries // 128), -(-keys // 128)
    keep = torch.rand(1, 4, nqb, nkb, generator=rng.generator("flex")) < 0.6
    return Blocks.of(keep, queries=queries, keys=keys, q_block=128, k_block=128)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("kind", ["blocks", "spans"])
def test_what_flex_is_given_through_its_compiled_kernel(kind):
    """On a CPU, where it gives the output alone."""
    selection = _for_flex(kind, 300, 700)
    q, k, v = tensors(1, 4, 2, 300, 700, 64)
    mask = (flex._blocks if kind == "blocks" else flex._spans)(selection, q.device)
    kernel = flex._compiled()
    with torch.no_grad():
        out = kernel(q, k, v, block_mask=mask, scale=64**-0.5, enable_gqa=True)
    assert_close_as_torch(out, q, k, v, selection.mask())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["blocks", "spans"])
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flex_on_a_gpu_both_ways(kind, size, softcap):
    """Beside the reference it may be as wrong as the other kernel of PyTorch's that takes a mask in float32."""
    selection = _for_flex(kind, 700, 900)
    inputs = [x.cuda() for x in tensors(1, 4, 2, 700, 900, size)]
    mask, there = selection.mask().cuda(), _moved(selection)

    def by(impl):
        return functools.partial(ops.attend, selection=there, softcap=softcap, impl=impl)

    if softcap is not None:
        with pytest.raises(CannotRun, match="under a softcap"):
            by("flex")(*(x.requires_grad_() for x in inputs))
    found = functools.partial(_both_ways, mask=mask, backward=softcap is None)
    exact, theirs = found(by("reference"), [x.double() for x in inputs]), [found(by("reference"), inputs)]
    if softcap is None:
        masked = functools.partial(torch_attention, mask=mask, backend=SDPBackend.EFFICIENT_ATTENTION)
        theirs.append(found(masked, inputs))
    for i, (name, ours) in enumerate(zip(("out", "lse", "dq", "dk", "dv"), found(by("flex"), inputs))):
        assert_no_worse(ours, exact[i], [one[i] for one in theirs], name)


def _both_ways(attention, inputs, mask, backward):
    """Output, lse, and gradients."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    out, lse = attention(*inputs)
    weights = torch.randn(out.shape, generator=rng.generator("weights", 0, *out.shape)).to(out)
    found = [out, torch.where(mask.any(-1), lse, 0.0)]
    total = (out * weights).sum() + found[1].sum()
    return [x.detach() for x in (*found, *(torch.autograd.grad(total, inputs) if backward else ()))]


def _moved(s: Selection, device: str = "cuda") -> Selection:
    return dataclasses.replace(s, **{n: x.to(device) for n, x in vars(s).items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize("tokens, heads, chosen", [(64, 2, "reference"), (512, 64, "reference"), (4096, 2, "torch")])
def test_what_our_kernels_refuse_on_a_gpu_is_not_computed_in_small_pieces(tokens, heads, chosen, monkeypatch):
    """Heads of 8: small nets have them."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    selection = dense(tokens, tokens)
    with FakeTensorMode():
        q = torch.empty(1, heads, tokens, 8, device="cuda")
        found = ops.explain(lambda: ops.attend(q, q, q, selection))
    assert next(name for name, why in found.items() if not why) == chosen


MIXED = pytest.mark.parametrize("kinds", [["spans"], ["spans", "blocks"], ["blocks", "spans"]], ids="/".join)


@MIXED
@pytest.mark.parametrize("joined", ["per head", "together"])
def test_spans_may_lie_on_the_cpu_whatever_the_device(kinds, joined):
    """As `dense` and windows do, whose numbers need no device; beside lists that lie on another one, here "meta"."""
    selection = _mixed(kinds, joined, "meta")
    q = torch.empty(1, 4, 60, 8, device="meta")
    out, lse = ops.attend(q, q, q, selection, impl="reference")
    assert out.shape == q.shape and out.device == lse.device == q.device
    selection.count()


@pytest.mark.gpu
@MIXED
@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
def test_spans_may_lie_on_the_cpu_where_a_gpu_attends(kinds, impl):
    q, k, v = tensors(1, 4, 2, 60, 60, 8)
    out, lse = ops.attend(q.cuda(), k.cuda(), v.cuda(), _mixed(kinds, "per head", "cuda"), impl=impl)
    assert_close_as_torch(out.cpu(), q, k, v, _mixed(kinds, "per head", "cpu").mask(), lse=lse.cpu())


def _mixed(kinds: list[str], joined: str, device: str) -> Selection:
    """Parts of these kinds for 4 heads, "together" or some of them "per head"; those that are no spans lie there."""
    heads = 4 if joined == "together" else 4 // len(kinds)
    parts = [build(kind, 1, heads, 60, 60, True, 3, 32) for kind in kinds]
    parts = tuple(part if part.kind == "spans" else _moved(part, device) for part in parts)
    shape = {"queries": 60, "keys": 60}
    if joined == "together":
        return Together(parts=parts, times=(1.0,) * len(parts), **shape)
    return PerHead(parts=tuple((torch.arange(heads) + heads * i, part) for i, part in enumerate(parts)), **shape)


@pytest.mark.parametrize("kind", ["blocks", "gather"])
def test_heads_with_the_same_lists_are_computed_together_and_come_out_alike(kind):
    one = build(kind, 2, 2, 100, 130, True, 3, 32)
    lists = {n: x.repeat_interleave(2, 1) for n, x in vars(one).items() if isinstance(x, torch.Tensor)}
    twins = dataclasses.replace(one, **lists)
    assert [s.members for s in shares(twins, 2, 4, 2)] == [(0, 1), (2, 3)] * 2
    assert len(shares(build(kind, 2, 4, 100, 130, True, 3, 32), 2, 4, 2)) == 8
    q, k, v = tensors(2, 4, 2, 100, 130, 32)
    out, lse = ops.attend(q, k, v, twins)
    assert_close_as_torch(out, q, k, v, twins.mask(), lse=lse)
