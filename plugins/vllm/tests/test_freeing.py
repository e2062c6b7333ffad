"""Which blocks the scheduler's side gives back, with vLLM's own pool of blocks and without a model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from saccade_vllm.freeing import FreeingManager, FreeingSpec
from saccade_vllm.reaching import freed_together
from vllm.v1.core.block_pool import BlockPool

from saccade.core.budget import Budget
from saccade.core.paths import SHIPPED
from saccade.core.site import Site
from saccade.engines.vllm import Settings

BLOCK, LAYERS, HEADS, LONGEST, POOL = 32, 30, 3, 1024, 64
MARK = json.loads((SHIPPED / "duo-attention" / "smollm2.json").read_text())["fingerprint"]
METHODS = [
    Settings("streaming", "64tok"),
    Settings("streaming:sink_tokens=0", "0.3"),
    Settings("duo-attention", "0.3", fingerprint=MARK),
    Settings("razor-attention:compensation=none,policy=roll", "0.3", fingerprint=MARK),
    Settings("moa", "0.3", fingerprint=MARK),
]


def sites(settings):
    shape = {"layers": LAYERS, "heads": 9, "kv_heads": HEADS, "head_size": 64, "queries": 1, "keys": 1, "seen": 1}
    budget = Budget.of(settings.budget)
    return tuple(Site(layer=i, stage="prefill", scale=0.125, budget=budget, **shape) for i in range(LAYERS))


def manager(settings, pool):
    there = sites(settings)
    mine = tuple(there[i] for i in freed_together(settings, there, LONGEST))
    assert mine
    spec = FreeingSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=64, dtype=torch.float32, sites=mine,
        settings=json.dumps(dataclasses.asdict(settings)),
    )  # fmt: skip
    return FreeingManager(
        spec, block_pool=pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=BLOCK
    )


def seen(manager, prompt, position):
    """Positions that a query at `position` sees in some head of some layer of the group, by `visible`."""
    at, heads, out = torch.arange(position + 1), torch.arange(HEADS), set()
    for site in manager.sites:
        state = {"prompt": torch.tensor([prompt] * HEADS)}
        site = dataclasses.replace(site, stage="decode", keys=position + 1, seen=position + 1, state=state)
        found = manager.method.visible(torch.tensor([[position]] * HEADS), at.expand(HEADS, -1), heads, site)
        out |= set(at[found.any(0)[0]].tolist())
    return out


@pytest.mark.parametrize("settings", METHODS, ids=lambda one: one.method)
@pytest.mark.parametrize("prompt", [1, 300])
def test_what_some_head_still_sees_is_held_and_the_rest_is_free(settings, prompt):
    pool = BlockPool(num_gpu_blocks=POOL, enable_caching=False, hash_block_size=BLOCK)
    mine, before = manager(settings, pool), pool.get_num_free_blocks()
    for done in range(prompt, prompt + 70, 23):
        mine.allocate_new_blocks("a", done, done)
        mine.remove_skipped_blocks("a", done, prompt)
        blocks, needed = mine.req_to_blocks["a"], {0} | {at // BLOCK for at in seen(mine, prompt, done)}
        assert {i for i, b in enumerate(blocks) if not b.is_null} == needed & set(range(len(blocks)))
        assert pool.get_num_free_blocks() == before - sum(not b.is_null for b in blocks)
    mine.free("a")
    assert pool.get_num_free_blocks() == before


def test_a_request_that_was_interrupted_has_another_prompt():
    pool = BlockPool(num_gpu_blocks=POOL, enable_caching=False, hash_block_size=BLOCK)
    mine = manager(METHODS[2], pool)
    mine.allocate_new_blocks("a", 200, 200)
    assert mine.prompts == {"a": 200}
    pool.free_blocks(reversed(mine.pop_blocks_for_free("a")))
    mine.allocate_new_blocks("a", 260, 260)
    mine.remove_skipped_blocks("a", 230, 200)
    assert mine.prompts == {"a": 260} and not any(block.is_null for block in mine.req_to_blocks["a"])


def test_layers_without_anything_to_let_go_are_no_group():
    settings = Settings("quest", "0.25")
    assert freed_together(settings, sites(settings), LONGEST) == ()
