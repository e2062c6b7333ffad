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
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = os.environ.get("TRITON_INTERPRET", "0") != "0"
interpreter = pytest.mark.skipif(not CHILD, reason="run by test_in_the_interpreter, in a process of its own")
ROOT = Path(__file__).parents[2]


def run_in_interpreter(file: str, seconds: int = 280) -> None:
    """The tests of a file that are marked `interpreter`, in a process with Triton's interpreter."""
    if CHILD:
        pytest.skip("this is that process")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", file]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _mend_the_interpreter() -> None:
    """Two faults of Triton 3.6's: scalars are arrays of one element, which NumPy 2.4 no longer takes for numbers; and
    `tl.dot` multiplies the bits of bfloat16 as if they were whole numbers."""
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

    own._patch_lang_tensor, own.InterpreterBuilder.create_dot = patched, right_dot


if CHILD:
    _mend_the_interpreter()
