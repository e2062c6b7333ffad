"""attend by flash-attn-4: on a CPU its reasons, its lists and rules, and what the library is called with (a stand-in
computes from these alone); on a CUDA device values, lse and gradients."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.errors import CannotRun
from saccade.core.selection import Blocks, Pairs, Selection, Spans
from saccade.ops.attend import flash4
from tests.helpers import assert_close_as_torch
from tests.ops.shapes import build, drawn, tensors
from tests.ops.test_attend_triton import check

KINDS = ("blocks", "bounds", "spans")  # causal blocks; blocks that are not; causal spans
SIZES = (32, 64, 80, 96, 128)
CPU = torch.device("cpu")


def selection(kind: str, queries: int, keys: int, *, b=1, h=4, q_block=128, k_block=128, seed=0) -> Selection:
    """Random; rows that see nothing occur."""
    if kind == "spans":
        sinks, window = drawn((h,), 0, 300, seed), drawn((h,), 0, keys + 2, seed + 1)
        return Spans(sinks=sinks * (sinks > 100), window=window, queries=queries, keys=keys)
    nqb, nkb = -(-queries // q_block), -(-keys // k_block)
    keep = torch.rand(b, h, nqb, nkb, generator=rng.generator("flash4", seed)) < 0.5
    shape = {"queries": queries, "keys": keys, "q_block": q_block, "k_block": k_block}
    return Blocks.of(keep, **shape, causal=kind == "blocks")


# --- why not --------------------------------------------------------------------------------------------------------


def refused(*inputs, chosen, **options) -> str:
    with pytest.raises(CannotRun) as error:
        ops.attend(*inputs, chosen, impl="flash4", **options)
    return str(error.value)


def test_it_says_every_reason_why_it_cannot(monkeypatch):
    monkeypatch.setattr(flash4, "installed", lambda: None)
    q, k, v = (x.requires_grad_() for x in tensors(1, 4, 2, 256, 256, 20))
    torch.use_deterministic_algorithms(True)
    try:
        said = refused(q, k, v[..., :16], chosen=build("lines", 1, 4, 256, 256, True, 1, 16), scale=-1.0)
    finally:
        torch.use_deterministic_algorithms(False)
    for why in (
        "flash-attn-4 runs on a CUDA device, and the inputs are on the cpu",
        "flash-attn-4 is not installed: pip install 'saccade[flash4]'",
        "it computes in float16 and bfloat16, and the inputs are float32",
        "heads of 20; it takes multiples of 8 from 32 to 128",
        "values of 16 beside keys of 20; they are to be of one size",
        "a scale of -1; it takes positive ones",
        "its gradients are added up in no fixed order, and deterministic algorithms are asked for",
        "it takes blocks and causal spans; the selection is of lines",
    ):
        assert why in said
    said = refused(q, k, v, chosen=build("blocks", 1, 4, 256, 256, True, 1, 64))
    empty = build("spans", 1, 4, 0, 256, True, 0, 64)
    assert "there is no query or no key" in refused(q[:, :, :0], k, v, chosen=empty)
    assert "blocks of 64 queries; its own have 128" in said and "blocks of 32 keys; its own have 128" in said


def test_it_says_that_the_device_is_too_old_or_the_library_broken(monkeypatch):
    x = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(flash4, "installed", lambda: "4.0")
    monkeypatch.setattr(flash4, "import_module", _fails)
    for found, words in (((8, 6), "compute capability 8.6; it takes 9.0 to 11.x"), ((9, 0), "does not import: Import")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        flash4._broken.cache_clear()
        assert words in flash4._machine(x)[0]
    flash4._broken.cache_clear()


def _fails(name):
    raise ImportError(name)


# --- lists and rules ------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """(kind, rows of the library's blocks, selection)."""
    kind, rows = draw(st.sampled_from(KINDS)), draw(st.sampled_from([128, 256]))
    keys = draw(st.integers(1, 900))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    q_block, k_block = rows * draw(st.integers(1, 3)), 128 * draw(st.integers(1, 3))
    b, h, seed = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 99))
    return kind, rows, selection(kind, queries, keys, b=b, h=h, q_block=q_block, k_block=k_block, seed=seed)


def made(rows: int, s: Selection):
    forward, backward, per_head = (flash4.of_blocks if isinstance(s, Blocks) else flash4.of_spans)(s, rows, CPU)
    return forward, backward(), per_head


def wide(count, block, size: tuple[int, int], shape):
    """The pairs of listed blocks. Every entry is a block that there is, and the counted ones ascend."""
    many = -(-shape[-1] // size[1])
    assert count.dtype == block.dtype == torch.int32 and block.is_contiguous() and count.is_contiguous()
    assert block.shape[-1] <= many and (count <= block.shape[-1]).all() and ((block >= 0) & (block < many)).all()
    listed = torch.arange(block.shape[-1]) < count[..., None]
    assert (block.diff(dim=-1)[listed[..., 1:]] > 0).all()
    table = torch.zeros(*block.shape[:3], many, dtype=torch.long)
    table = table.scatter_add_(-1, block.long(), listed.long()).bool()
    return table.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[..., : shape[-2], : shape[-1]]


@given(cases())
def test_the_lists_are_the_selection_both_ways(case):
    """What is whole, and what is listed and obeys the rule, are its pairs; each once."""
    kind, rows, s = case
    forward, backward, _ = made(rows, s)
    mask = s.mask()
    rule = mask if kind == "spans" else causal(s) if s.causal else torch.ones_like(mask)
    for lists, size, wanted, obeyed in ((forward, (rows, 128), mask, rule), (backward, (128, rows), mask.mT, rule.mT)):
        some, whole = wide(*lists[:2], size, wanted.shape), wide(*lists[2:], size, wanted.shape)
        assert not (some & whole).any()
        assert torch.equal((some & obeyed) | whole, wanted)


def causal(s: Selection):
    return torch.arange(s.keys) <= torch.arange(s.offset, s.keys)[:, None]


def test_what_need_not_be_masked_is_listed_as_whole():
    """The rule is read for the diagonal alone, and for the edges of sinks and window."""
    s = Blocks.of(torch.ones(1, 1, 8, 8, dtype=torch.bool), queries=1024, keys=1024, q_block=128, k_block=128)
    lists = made(128, s)[0]
    assert lists.count.flatten().tolist() == [1] * 8 and lists.whole_count.flatten().tolist() == list(range(8))
    lists = made(128, Spans(sinks=torch.tensor([4]), window=torch.tensor([256]), queries=1024, keys=1024))[0]
    assert lists.count.max() <= 3 and lists.whole_count[0, 0, 3:].tolist() == [1] * 5


@pytest.fixture
def library(monkeypatch):
    """A stand-in: eager tensors in place of compiled ones, and attention from lists and rule alone."""
    calls, here = [], {}
    for name in ("cutlass", "cutlass.cute", "flash_attn", "flash_attn.cute", "flash_attn.cute.utils"):
        here[name] = ModuleType(name)
    here["cutlass"].cute, here["cutlass"].Int32 = here["cutlass.cute"], torch.int32
    here["cutlass.cute"].jit = lambda f: f
    here["flash_attn.cute.utils"].scalar_to_ssa = lambda x, dtype: x
    here["flash_attn.cute.block_sparsity"] = SimpleNamespace(BlockSparseTensorsTorch=_Sparse)
    here["flash_attn.cute.interface"] = SimpleNamespace(flash_attn_func=lambda *a, **o: _stand_in(calls, *a, **o))
    for name, module in here.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "saccade.ops.attend.flash4_rules", raising=False)
    monkeypatch.setattr(flash4, "_machine", lambda q: [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    flash4._rule.cache_clear()
    yield calls
    flash4._rule.cache_clear()
    sys.modules.pop("saccade.ops.attend.flash4_rules", None)


def _Sparse(count, block, whole_count, whole_block, block_size):
    return (count, block, whole_count, whole_block), block_size


def _stand_in(calls, q, k, v, *, softmax_scale, softcap, pack_gqa, return_lse, mask_mod, block_sparse_tensors, **rest):
    calls.append((q, k, v, rest))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    h, n, m = q.shape[1], q.shape[2], k.shape[2]
    (lists, size), lengths = block_sparse_tensors, SimpleNamespace(seqlen_q=n, seqlen_k=m)
    some, whole = (wide(*x, size, (n, m)) for x in (lists[:2], lists[2:]))
    query, key = torch.arange(n)[:, None], torch.arange(m)
    rules = [mask_mod([0], [i], query, key, lengths, rest.get("aux_tensors")).expand(n, m) for i in range(h)]
    mask = (some & torch.stack(rules)) | whole
    assert return_lse and pack_gqa is False
    pairs = Pairs(allowed=mask, queries=n, keys=m, causal=False)
    out, lse = ops.attend(q, k, v, pairs, scale=softmax_scale, softcap=softcap or None, impl="reference")
    return out.transpose(1, 2), lse


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("h", [1, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_library_is_called_with_the_whole_selection(kind, h, softcap, library):
    s = selection(kind, 300, 450, h=h)
    inputs = tensors(2, 4, 2, 300, 450, 32, torch.bfloat16)
    out, lse = ops.attend(*inputs, s, softcap=softcap, scale=0.3, impl="flash4")
    assert_close_as_torch(out, *inputs, s.mask(), softcap=softcap, scale=0.3, lse=lse)
    q, k, v, rest = library[0]
    assert q.shape == (2, 300, 4, 32) and k.shape == v.shape == (2, 450, 2, 32)
    assert "block_sparse_tensors_bwd" not in rest
    assert q.data_ptr() == inputs[0].data_ptr(), "it was copied"
    ops.attend(*(x.requires_grad_() for x in inputs), s, impl="flash4")
    assert library[1][3]["block_sparse_tensors_bwd"][1] == (128, 128)


def test_inputs_that_its_loads_do_not_fit_are_copied():
    x = torch.randn(1, 2, 8, 36, dtype=torch.bfloat16)
    line = torch.as_strided(x, (1, 2, 8, 32), (1, 288, 32, 1))  # a batch of one, at an odd step
    for odd in (line, x[..., :32], x[:, :1].expand(1, 2, 8, 36)[..., :32], torch.stack([x, x], -1)[..., :32, 0]):
        laid = flash4._laid(odd)
        assert torch.equal(laid, odd.transpose(1, 2)) and laid.transpose(1, 2).is_contiguous()


# --- on a GPU -------------------------------------------------------------------------------------------------------


HERE = {"device": "cuda", "impl": "flash4"}


def gpu(test):
    """Marked, and skipped where the library is not."""
    why = flash4.installed() is None
    return pytest.mark.gpu(pytest.mark.skipif(why, reason="flash-attn-4 is not installed")(test))


@gpu
def test_it_can_run_here():
    """Fails, with the reasons, where the other tests would all fail for them."""
    q, k, v = (x.cuda() for x in tensors(1, 4, 2, 256, 256, 64, torch.bfloat16))
    assert ops.explain(lambda: ops.attend(q, k, v, selection("blocks", 256, 256)))["flash4"] == []


@gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_both_ways_at_every_head_size(kind, size):
    inputs = tensors(2, 4, 2, 700, 900, size, torch.bfloat16)
    if size == 80:
        with pytest.raises(CannotRun, match="gradients of heads of 80"):
            check(selection(kind, 700, 900, q_block=256), inputs, **HERE)
    else:
        check(selection(kind, 700, 900, q_block=256), inputs, **HERE)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_blocks_of_queries(kind):
    """Of 128; on Blackwell they are refused."""
    if torch.cuda.get_device_capability()[0] > 9:
        pytest.skip("its blocks have 256 queries here")
    check(selection(kind, 700, 900), tensors(1, 4, 2, 700, 900, 128, torch.bfloat16), **HERE)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_equal_heads(kind):
    check(selection(kind, 700, 700, q_block=256), tensors(1, 4, 4, 700, 700, 64, torch.float16), **HERE)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_one_list_for_all_heads(kind):
    check(selection(kind, 512, 512, h=1, q_block=256), tensors(2, 8, 2, 512, 512, 128, torch.bfloat16), **HERE)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_softcap(kind):
    inputs = tensors(1, 4, 2, 700, 900, 64, torch.bfloat16)
    check(selection(kind, 700, 900, q_block=256), inputs, softcap=5.0, **HERE)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_without_those_of_lse_and_a_scale(kind):
    inputs = tensors(1, 4, 2, 700, 900, 128, torch.bfloat16)
    check(selection(kind, 700, 900, q_block=256), inputs, with_lse=False, scale=0.2, **HERE)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_large_blocks(kind):
    s = selection(kind, 1500, 1700, q_block=512, k_block=384)
    check(s, tensors(1, 4, 2, 1500, 1700, 128, torch.bfloat16), **HERE)


@gpu
@pytest.mark.parametrize("queries, keys", [(1, 128), (1, 900), (40, 40), (128, 128)])
def test_short_lengths(queries, keys):
    s = selection("blocks", queries, keys, q_block=256)
    check(s, tensors(1, 4, 2, queries, keys, 128, torch.bfloat16), **HERE)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(kind):
    def odd(x):
        return torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]]

    turned, apart = lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, x], -1)[..., 0]
    for layout in (odd, turned, apart, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        inputs = tensors(1, 4, 2, 700, 900, 128, torch.bfloat16)
        check(selection(kind, 700, 900, q_block=256), inputs, layout=layout, **HERE)


@gpu
def test_auto_does_not_take_it():
    q, k, v = (x.cuda() for x in tensors(1, 4, 2, 256, 256, 64, torch.bfloat16))
    said = []
    ops.attend(q, k, v, selection("spans", 256, 256), report=said.append)
    assert said == ["attend:triton"]
