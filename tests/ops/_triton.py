"""Triton kernels in tests: in Triton's interpreter (a child process on the CPU), and on a CUDA device (marked gpu).

    from tests.ops._triton import DEVICE, interpreter, run_in_interpreter

    def test_in_the_interpreter():
        run_in_interpreter(__file__)

    @interpreter                      # runs in the child, small shapes
    def test_...(): ...

The variable that asks for the interpreter must be set before Triton decorates a kernel, and it would change what other
tests of the same process see: so a child.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests import processes
from tests.helpers import TURNS, assert_within, error, exact_attention, rounding

CHILD = os.environ.get("TRITON_INTERPRET", "0") != "0"
ROOT = Path(__file__).parents[2]


def interpreter(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs in the child, and there alone; the others of its file run here, and need not twice."""
    reason = "run by test_in_the_interpreter, in a process of its own"
    return pytest.mark.interpreter(pytest.mark.skipif(not CHILD, reason=reason)(test))


def run_in_interpreter(file: str, seconds: int = 280) -> None:
    """The tests of a file that are marked `interpreter`, in a process with Triton's interpreter; there must be some."""
    if CHILD:
        pytest.skip("this is that process")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    given = ["-q", "-p", "no:cacheprovider", "-m", "interpreter", "--rootdir", str(ROOT), file]
    code, said = processes.run("pytest:main", given, seconds=seconds, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert code == 0, said[-8000:]


def assert_close_on_a_gpu(
    actual: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, softcap: float | None, lse: Tensor
) -> None:
    """As `assert_close_as_torch`, where PyTorch has no flash kernel for a mask: its softmax in float32, weights rounded
    to the dtype of the values for the second product, as its flash kernels round them."""
    exact, exact_lse = exact_attention(q, k, v, mask, softcap=softcap)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    bounds = [rounding(exact, q.dtype)], [rounding(exact_lse, q.dtype)]
    if softcap is None:  # whichever kernel PyTorch has for a mask
        wide = mask.expand(*q.shape[:2], *mask.shape[2:]) | ~mask.any(-1, keepdim=True)
        own = scaled_dot_product_attention(q, k, v, attn_mask=wide)
        bounds[0].append(error(own.masked_fill(~mask.any(-1, keepdim=True), 0.0), exact))
    for turn in TURNS:
        logits = q.float().roll(turn, -1) @ k.float().roll(turn, -1).mT * q.shape[-1] ** -0.5
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~mask, -torch.inf)
        bounds[1].append(error(logits.logsumexp(-1), exact_lse))
        bounds[0].append(error(logits.softmax(-1).nan_to_num(0.0).to(v.dtype) @ v, exact))
    assert_within(actual, exact, max(bounds[0]), "output")
    assert_within(lse, exact_lse, max(bounds[1]), "lse")


def _mend_the_interpreter() -> None:
    """Three faults of Triton 3.6's: scalars are arrays of one element, which NumPy 2.4 no longer takes for numbers;
    `tl.dot` multiplies the bits of bfloat16 as if they were whole numbers; float32 is cut to bfloat16, not rounded. And
    two that take minutes: a reduction by a function of ours goes number by number, and every call of one of our
    functions from a kernel changes the language again as the kernel's call already did."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter as own

    patch, dot = own._patch_lang_tensor, own.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return own.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def right_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    convert = own._convert_float

    def rounded(x, kind, to, mode):
        if kind != tl.float32 or to != tl.bfloat16:
            return convert(x, kind, to, mode)
        bits = x.view(numpy.uint32)
        near = ((bits.astype(numpy.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)
        return numpy.where(numpy.isnan(x.view(numpy.float32)), numpy.uint16(0x7FC0), near)

    one_by_one = own.ReduceOps.generic_reduce

    def by_rows(self, given):
        if self.axis is None or self.keep_dims or given[0].handle.data.ndim < 2:
            return one_by_one(self, given)
        rows = zip(*(numpy.moveaxis(x.handle.data, self.axis, 0) for x in given))
        first, *others = [[self.to_tensor(row, x.dtype) for row, x in zip(some, given)] for some in rows]
        for other in others:
            both = self.combine_fn.fn(*first, *other)
            first = both if isinstance(both, tuple) else (both,)
        return list(first)

    own.ReduceOps.generic_reduce = by_rows
    change, launch, changed = own._patch_lang, own.GridExecutor.__call__, set()

    def changed_once(fn):
        here = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
        if here <= changed:
            return None
        changed.update(here)
        return change(fn)

    def launched(self, *args, **options):
        changed.clear()  # a kernel that ends puts the language back
        return launch(self, *args, **options)

    own._patch_lang, own.GridExecutor.__call__ = changed_once, launched
    own._patch_lang_tensor, own.InterpreterBuilder.create_dot, own._convert_float = patched, right_dot, rounded


if CHILD:
    _mend_the_interpreter()
