"""A method at work over blocks of keys, by itself: no vLLM, no model, and on CUDA too where there is one."""

from __future__ import annotations

import pytest
import torch
from saccade_vllm.working import Row, Work

from saccade.core.budget import Budget
from saccade.core.method import made
from saccade.core.site import Site

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 4, 2, 32, 16, 40
PROMPTS, STEPS = (200, 130), 3
METHODS = ["minference", "hip", "xattention", "moba", "quest:dense_layers=0", "tidaldecode", "streaming"]


def site(layer):
    return Site(
        layer=layer, layers=4, heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, stage="prefill", queries=1, keys=1,
        seen=1, scale=SIZE**-0.5, budget=Budget.of("0.3"), bytes_per_token=0,
    )  # fmt: skip


def work(method, device):
    """Outputs of four layers for two requests: their prompts in one step, then some steps of a token each."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, device="cpu").to(device)  # noqa: E731
    order = torch.randperm(BLOCKS, generator=random, device="cpu").to(device).view(2, -1)
    handed, out = {}, []
    layers = [Work(made(method), site(i), 2, handed) for i in range(4)]
    caches = [torch.full((BLOCKS, KV_HEADS, BLOCK, 2 * SIZE), torch.nan, device=device) for _ in layers]
    for step in range(STEPS + 1):
        new = [1, 1] if step else list(PROMPTS)
        seen = [prompt + step for prompt in PROMPTS]
        start = [0, new[0], sum(new)]
        rows = [Row(start[i], start[i + 1], seen[i], not step, order[i], int(order[i, 0])) for i in range(2)]
        for layer, cache in zip(layers, caches):
            q, k, v = draw(sum(new), HEADS, SIZE), draw(sum(new), KV_HEADS, SIZE), draw(sum(new), KV_HEADS, SIZE)
            at = [torch.arange(seen[i] - new[i], seen[i], device=device) for i in range(2)]
            slots = torch.cat([order[i][at[i] // BLOCK] * BLOCK + at[i] % BLOCK for i in range(2)])
            layer.write(cache, k, v, slots)
            out.append(torch.full_like(q, torch.nan))
            layer.attend(q, k, v, rows, out[-1])
    return torch.cat(out)


@pytest.mark.parametrize("method", METHODS)
def test_whatever_is_made_lies_where_the_blocks_do(method):
    here = work(method, "cpu")
    with torch.device("meta"):  # what names no device lands there, and reaches nothing that does
        assert torch.equal(work(method, "cpu"), here)
    assert not here.isnan().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
def test_on_cuda_the_outputs_are_those_of_the_cpu(method):
    torch.testing.assert_close(work(method, "cuda").cpu(), work(method, "cpu"))
