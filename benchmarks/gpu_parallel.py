"""Texts shared among several GPUs (docs/parallel.md): are results those of one process, and what does each hold?

    PYTHONPATH=src torchrun --nproc_per_node 4 benchmarks/gpu_parallel.py --json FILE.json
    PYTHONPATH=src torchrun --nproc_per_node 2 benchmarks/gpu_parallel.py --device cpu --tiny     # the same, over gloo

check: a random Llama in float32 reads one text in one process, then shared by heads and in a ring: loss, logits and all
gradients, relative to the largest of each kind, must agree to 1e-5; greedy tokens must be the same.

grow: a wider one in bfloat16 at growing lengths. train: seconds of forward and backward, and what the process holds at
most on top of weights and gradients (on a CPU: what the forward leaves for the backward). prefill: seconds, the same,
and the bytes of the cache. `one` is one process alone; it stops where the next length would not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import saccade
from saccade.core import rng
from saccade.engines import parallel
from saccade.measure.environment import environment

SMALL = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 1024,
}  # fmt: skip
WIDE = SMALL | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "head_dim": 128, "vocab_size": 32768,
}  # fmt: skip
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 128}
LENGTHS = {"cuda": [8192, 16384, 32768, 65536, 131072, 262144], "cpu": [256, 512]}
EQUAL = 1e-5
ROOM = 0.85  # of a device's memory that a length may be foreseen to take
WAYS = ("heads", "ring")
RINGS = ("full", "streaming@0.25")
CHECKED = {"heads": (*RINGS, "minference@0.25", "xattention@0.25"), "ring": RINGS}
LONG = ("full", "minference@0.1")
GROWN = {"one": LONG, "heads": LONG, "ring": ("full", "streaming@4096tok")}
WRITTEN = ("full", "quest:dense_layers=0@0.25", "snapkv@0.25", "minference@0.25")


def main() -> int:
    """0 if everything that was shared came to the same."""
    args = _arguments()
    device = _set_up(args.device)
    found: dict[str, Any] = {"ranks": dist.get_world_size(), "environment": environment(device.type)}
    found["check"] = check(device, args.tiny)
    if not args.only_check:
        found["grow"] = grow(device, args)
    if args.json and dist.get_rank() == 0:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()
    return int(not all(row["equal"] for row in found["check"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only-check", action="store_true", help="no growing lengths")
    parser.add_argument("--lengths", type=int, nargs="*", help="of the growing texts")
    parser.add_argument("--seconds", type=float, default=240.0, help="after which no further length is begun (240)")
    parser.add_argument("--json", help="where all numbers go")
    return parser.parse_args()


def _set_up(kind: str) -> torch.device:
    """One process per GPU over nccl; processes of one CPU over gloo."""
    if kind == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def say(*words: Any) -> None:
    """By the first process."""
    if dist.get_rank() == 0:
        print(*words, flush=True)


def model_of(shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    """The same random weights in every process, drawn on its device."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:
            config = LlamaConfig(**shape, max_position_embeddings=1 << 20, attn_implementation="sdpa")
            return LlamaForCausalLM(config).to(dtype).eval()


def text_of(tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    """One row of random tokens."""
    return torch.randint(3, vocabulary, (1, tokens), generator=rng.generator("parallel", 0, tokens)).to(device)


@contextlib.contextmanager
def working(model: Any, way: str, contestant: str) -> Iterator[Any]:
    """A method attached, the texts shared that way or, by "one", not at all."""
    name, _, budget = contestant.partition("@")
    sharing = contextlib.nullcontext() if way == "one" else parallel.sequence(way)
    with sharing, saccade.attach(model, name, budget=budget or 1.0) as run:
        yield run


# --- is it the same? --------------------------------------------------------------------------------------------------


def check(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Every way and method against one process."""
    shape, tokens = (TINY, 200) if tiny else (SMALL, 2043)
    model, rows = model_of(shape, device, torch.float32), []
    ids = text_of(tokens, shape["vocab_size"], device)
    alone = {who: trained(model, "one", who, ids) for who in CHECKED["heads"]}
    for way in WAYS:
        for who in CHECKED[way]:
            apart = {name: differ(x, alone[who][name]) for name, x in trained(model, way, who, ids).items()}
            rows.append({"way": way, "who": who, "apart": apart, "equal": max(apart.values()) <= EQUAL})
            told = ", ".join(f"{name} {x:.1e}" for name, x in apart.items())
            say(f"check {way:5} {who:16} {told}: {'equal' if rows[-1]['equal'] else 'NOT EQUAL'}")
    for who in WRITTEN:
        same = torch.equal(written(model, "heads", who, ids), written(model, "one", who, ids))
        rows.append({"way": "heads", "who": who, "equal": same})
        say(f"check heads {who:26} tokens written: {'equal' if same else 'NOT EQUAL'}")
    return rows


def trained(model: Any, way: str, who: str, ids: Tensor) -> dict[str, Tensor]:
    """Loss, logits of the whole text, and all gradients in one row."""
    model.zero_grad(set_to_none=True)
    with working(model, way, who):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        if way != "one":
            parallel.average_gradients(model)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"loss": loss.detach(), "logits": logits, "gradients": gradients}


def written(model: Any, way: str, who: str, ids: Tensor) -> Tensor:
    """Greedy tokens."""
    with working(model, way, who):
        return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


def differ(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value; the worst of all processes."""
    worst = ((a - b).abs().max() / b.abs().max()).float()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


# --- what does it take? -----------------------------------------------------------------------------------------------


def grow(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Longer and longer texts, until they would not fit or the time is up."""
    shape, until = TINY if args.tiny else WIDE, time.monotonic() + args.seconds
    model, rows = model_of(shape, device, torch.float32 if args.tiny else torch.bfloat16), []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    full: set[tuple[str, str, str]] = set()
    for tokens in args.lengths or LENGTHS[device.type]:
        ids = text_of(tokens, shape["vocab_size"], device)
        for what, measure in (("prefill", prefill), ("train", train)):
            for way, who in [(way, who) for way, some in GROWN.items() for who in some]:
                key = (what, way, who)
                done = (what == "prefill" and way == "ring") or key in full
                if done or anywhere(time.monotonic() > until, device):
                    continue
                row = {"what": what, "way": way, "who": who, "tokens": tokens, **measure(model, way, who, ids, device)}
                rows.append(row)
                say(shown(row))
                if anywhere(not fits(2.2 * row["held"], device), device):
                    full.add(key)
    return rows


def anywhere(here: bool, device: torch.device) -> bool:
    """Whether it is so in some process: what all of them go by."""
    found = torch.tensor([float(here)], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def fits(more: float, device: torch.device) -> bool:
    """Whether so many bytes on top of what is there are within a device's memory."""
    if device.type == "cpu":
        return True
    return torch.cuda.memory_allocated(device) + more < ROOM * torch.cuda.get_device_properties(device).total_memory


def train(model: Any, way: str, who: str, ids: Tensor, device: torch.device) -> dict[str, float]:
    """Forward and backward."""

    def work() -> None:
        with working(model, way, who):
            model(ids, labels=ids, use_cache=False).loss.backward()

    return measured(work, device)


def prefill(model: Any, way: str, who: str, ids: Tensor, device: torch.device) -> dict[str, float]:
    """A prompt, and its cache."""
    cache = 0

    def work() -> None:
        nonlocal cache
        with working(model, way, who) as run, torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
            cache = run.record.bytes_held

    return measured(work, device) | {"cache": cache}


def measured(work: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of the faster of two turns after one to warm up, and bytes at most on top; the worst of all processes."""
    held, seconds = 0.0, []
    for turn in range(3):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        dist.barrier()
        began = time.perf_counter()
        if device.type == "cuda":
            work()
            torch.cuda.synchronize(device)
            held = float(torch.cuda.max_memory_allocated(device) - before)
        else:
            held = left_behind(work)
        if turn:
            seconds.append(time.perf_counter() - began)
    worst = torch.tensor([held, min(seconds)], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {"held": float(worst[0]), "seconds": float(worst[1])}


def left_behind(work: Callable[[], None]) -> float:
    """Bytes that the forward keeps for the backward, each storage counted once, without the model's own weights."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x if x._base is None else x._base, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        work()
    return float(sum(kept.values()))


def shown(row: dict[str, Any]) -> str:
    """A row, to read."""
    cache = f", cache {row['cache'] / 2**20:.0f} MiB" if "cache" in row else ""
    return (f"{row['what']:7} {row['way']:5} {row['who']:18} {row['tokens']:7} tokens: {row['seconds']:.3f} s,"
            f" {row['held'] / 2**20:.1f} MiB a process{cache}")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
