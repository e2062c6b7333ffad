"""A method at work over blocks of keys, by itself: no vLLM, no model, and on CUDA too where there is one."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect

import pytest
import torch
from saccade_vllm import paging, working
from saccade_vllm.working import Row, Work

from saccade import ops
from saccade.core.budget import Budget
from saccade.core.method import made
from saccade.core.site import Site
from saccade.ops.device import interpreted

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 4, 2, 32, 16, 40
PROMPTS, STEPS = (200, 130), 3
READS_PROMPTS = ["minference", "hip", "xattention", "moba"]
METHODS = [*READS_PROMPTS, "quest:dense_layers=0", "streaming"]
SITE = Site(
    layer=0, layers=1, heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, stage="prefill", queries=1, keys=1, seen=1,
    scale=SIZE**-0.5, budget=Budget.of("0.3"), bytes_per_token=0,
)  # fmt: skip


def steps():
    """Rows, slots and new q, k, v, of two requests whose blocks lie anyhow: prompts at once, then a token each."""
    random = torch.Generator().manual_seed(0)
    table = torch.randperm(BLOCKS, generator=random).view(2, -1)
    for step in range(STEPS + 1):
        new, seen = [1, 1] if step else list(PROMPTS), [prompt + step for prompt in PROMPTS]
        start = [0, new[0], sum(new)]
        rows = [Row(start[i], start[i + 1], seen[i], not step, table[i], int(table[i, 0])) for i in range(2)]
        at = [torch.arange(seen[i] - new[i], seen[i]) for i in range(2)]
        slots = torch.cat([table[i][at[i] // BLOCK] * BLOCK + at[i] % BLOCK for i in range(2)])
        sizes = [(sum(new), heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        yield rows, slots, [torch.randn(size, generator=random) for size in sizes]


def worked(method, device):
    """What a layer gives in each of these steps."""
    layer, out = Work(made(method), SITE, 2, {}), []
    blocks = torch.full((BLOCKS, KV_HEADS, BLOCK, 2 * SIZE), torch.nan, device=device)
    for rows, slots, new in steps():
        rows = [dataclasses.replace(row, table=row.table.to(device)) for row in rows]
        q, k, v = (x.to(device) for x in new)
        layer.write(blocks, k, v, slots.to(device))
        out.append(torch.full_like(q, torch.nan))
        layer.attend(q, k, v, rows, out[-1])
    return [x.cpu() for x in out]


@pytest.mark.parametrize("method", READS_PROMPTS)
def test_a_prompt_is_read_as_the_method_reads_it_without_blocks(method):
    found, (rows, _, new) = worked(method, "cpu")[0], next(steps())
    here = Work(made(method), SITE, 2, {}).here
    for row in rows:
        q, k, v = (x[row.start : row.stop].transpose(0, 1)[None] for x in new)
        site = dataclasses.replace(here, queries=row.seen, keys=row.seen, seen=row.seen)
        torch.testing.assert_close(found[row.start : row.stop], made(method).attend(q, k, v, site)[0].transpose(0, 1))


@pytest.mark.parametrize("module", [paging, working])
def test_whatever_is_made_says_on_which_device(module):
    makes = {"arange", "tensor", "zeros", "ones", "full", "empty"}
    for call in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in {f"torch.{name}" for name in makes}:
            assert "device" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)


@pytest.mark.skipif(not interpreted(), reason="needs Triton, and TRITON_INTERPRET=1")
def test_the_kernels_of_cuda_read_a_prompt_the_same_in_the_interpreter(monkeypatch):
    here = worked("minference", "cpu")[0]
    monkeypatch.setattr(ops, "attend", functools.partial(ops.attend, impl="triton"))
    torch.testing.assert_close(worked("minference", "cpu")[0], here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
def test_on_cuda_the_outputs_are_those_of_the_cpu(method):
    for there, here in zip(worked(method, "cuda"), worked(method, "cpu"), strict=True):
        torch.testing.assert_close(there, here)
