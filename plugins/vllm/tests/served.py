"""A real vLLM in a process of its own: reads what to serve as JSON, and says what came of it.

One engine is started, with the first of the settings; under each of the others the same engine runs on, with another
method in its layers. In this process, so that the scheduler's blocks can be counted after every step, and so that what
the layers did is compared with the library's own (`replayed.py`) without being written out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB


def main() -> None:
    """Ask as {"settings": [...], "against": [...], "prompts": [[token ids]], "new_tokens": n, "model": folder,
    "options": {...}}; against: the settings of the library's run beside each.
    """
    from replayed import Recorder, replay
    from vllm import LLM

    import saccade
    from saccade.engines.vllm import Settings, launch

    asked, model = json.load(sys.stdin), saccade.load()[0]
    settings, against = ([Settings(**one) for one in asked[name]] for name in ("settings", "against"))
    prompts = asked["prompts"]
    options = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 4096, "max_num_seqs": 16}
    options |= {"block_size": 32, "enforce_eager": True, "async_scheduling": False}  # a step is done when it returns
    options |= {**_memory(), **asked.get("options", {})}
    llm, out = LLM(asked["model"], **options, **launch(settings[0])), []
    for number, (one, other) in enumerate(zip(settings, against, strict=True)):
        works = _works(llm, one if number else None)
        recorder = Recorder(works, prompts)
        found = _generate(llm, prompts, asked["new_tokens"])
        did = zip(prompts, found["tokens"], recorder.steps, strict=True)
        found["replayed"] = [replay(model, other, *each) for each in did]
        found |= {"read": sum(w.read for w in works), "there": sum(w.there for w in works)}
        out.append({"settings": dataclasses.asdict(one), **found})
    print("ANSWER", json.dumps(out))


def _memory() -> dict[str, Any]:
    """On CUDA as little as on the CPU, where the environment says it: what methods store beside the keys needs more."""
    from vllm.platforms import current_platform

    return {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.1} if current_platform.is_cuda() else {}


def _works(llm: Any, settings: Any) -> list[Any]:
    """What works in the layers of the engine; settings: put another method there."""
    from saccade_vllm.working import Work

    from saccade.core.budget import Budget

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = [m for m in runner.get_model().modules() if hasattr(getattr(m, "impl", None), "work")]
    method, handed = settings and settings.equipped(), {}
    for layer in layers if settings else ():
        before = layer.impl.work
        site = dataclasses.replace(before.here, budget=Budget.of(settings.budget))
        assert method.check(site) == []
        layer.impl.work = Work(method, site, before.requests, handed)
    return [layer.impl.work for layer in layers]


def _generate(llm: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens of each prompt, and after each step the blocks that each group of layers holds."""
    from vllm import SamplingParams

    engine, held, tokens = llm.llm_engine, [], {}
    how = SamplingParams(temperature=0, max_tokens=new_tokens, min_tokens=new_tokens)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, how)
    manager = engine.engine_core.engine_core.scheduler.kv_cache_manager
    groups, pool = manager.coordinator.single_type_managers, manager.block_pool
    before = pool.get_num_free_blocks()
    while engine.has_unfinished_requests():
        for done in engine.step():
            tokens[done.request_id] = list(done.outputs[0].token_ids)
        blocks = [[b for row in group.req_to_blocks.values() for b in row if not b.is_null] for group in groups]
        held.append([before - pool.get_num_free_blocks(), *map(len, blocks)])
    kinds = [type(group).__name__ for group in groups]
    layers = [len(g.layer_names) for g in manager.kv_cache_config.kv_cache_groups]
    rows = [tokens[key] for key in sorted(tokens, key=lambda name: int(name.split("-")[0]))]
    left = before - pool.get_num_free_blocks()
    return {"tokens": rows, "held": held, "groups": kinds, "layers": layers, "left": left}


if __name__ == "__main__":
    main()
