"""What the layers are told of a step."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from saccade_vllm.backend import Builder


def told(new, seen, prefilling):
    """Of a step with so many new tokens of each request, as vLLM's model runner says it."""
    start = torch.tensor([0, *new]).cumsum(0)
    table = torch.arange(2 * len(new)).view(-1, 2)
    step = SimpleNamespace(
        num_reqs=len(new), num_actual_tokens=sum(new), query_start_loc_cpu=start, seq_lens=torch.tensor(seen),
        is_prefilling=torch.tensor(prefilling), block_table_tensor=table, slot_mapping=torch.arange(sum(new)),
    )  # fmt: skip
    return Builder.build(SimpleNamespace(), 0, step)


def test_prompts_and_new_queries_are_rows():
    rows = told(new=[5, 1, 1], seen=[5, 9, 2], prefilling=[True, False, False]).rows
    assert [(row.start, row.stop, row.seen, row.prompt, row.first_block) for row in rows] == [
        (0, 5, 5, True, 0), (5, 6, 9, False, 2), (6, 7, 2, False, 4),
    ]  # fmt: skip


def test_a_prompt_of_one_token_is_a_row():
    assert [row.prompt for row in told(new=[1], seen=[1], prefilling=[True]).rows] == [True]


def test_requests_that_vllm_makes_up_to_capture_graphs_are_none():
    assert told(new=[1, 1, 3], seen=[1, 1, 3], prefilling=[False] * 3).rows == []
    assert told(new=[1, 0], seen=[4, 0], prefilling=[False] * 2).rows[0].seen == 4
