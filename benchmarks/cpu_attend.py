"""How much faster than dense attention `ops.attend` computes random blocks on a CPU, choosing of the blocks included.

    PYTHONPATH=src python benchmarks/cpu_attend.py

Every round times PyTorch's dense causal kernel and each density once, one after the other, so that a slow minute hits
them all; a ratio is of two times of one round. A line for each density, with blocks drawn for each key/value head (its
query heads share them) and with others for each query head: median, least and largest ratio over the rounds, and the
largest difference from the reference on a shorter text. `--json` prints the same for machines.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade import ops
from saccade.core import rng
from saccade.core.selection import Blocks
from saccade.measure import workloads
from saccade.measure.environment import environment

LISTS = ("kv", "query")
CHECKED_TOKENS = 1024  # the reference makes the whole map


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.10])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def inputs(args: argparse.Namespace, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values."""
    draw = rng.generator("benchmarks/cpu_attend")
    heads = (args.heads, args.kv_heads, args.kv_heads)
    q, k, v = (torch.randn(1, h, tokens, args.head_size, generator=draw) for h in heads)
    dtype = getattr(torch, args.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_blocks(args: argparse.Namespace, tokens: int, density: float, lists: str) -> Blocks:
    """Of the causal blocks the share `density`, those on the diagonal first; drawn per head of `lists`."""
    drawn = args.heads if lists == "query" else args.kv_heads
    draw = rng.generator("benchmarks/cpu_attend/blocks")
    return workloads.random_blocks(tokens, density, args.block, args.heads, drawn, draw)


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each density and kind of lists."""
    q, k, v = inputs(args, args.tokens)

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def sparse(density: float, lists: str) -> Tensor:
        return ops.attend(q, k, v, random_blocks(args, args.tokens, density, lists))[0]

    cases = [(density, lists) for lists in LISTS for density in args.densities]
    work = [dense, *(functools.partial(sparse, *case) for case in cases)]
    rounds = [[seconds(w) for w in work] for _ in range(args.rounds + 1)][1:]  # the first one warms up
    return [_row(args, *case, [(r[0], r[i]) for r in rounds]) for i, case in enumerate(cases, 1)]


def _row(args: argparse.Namespace, density: float, lists: str, times: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [dense / ours for dense, ours in times]
    return {
        "lists": lists,
        "density": density,
        "pairs": float(random_blocks(args, args.tokens, density, lists).density().mean()),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "largest": max(ratios),
        "dense_seconds": statistics.median(dense for dense, _ in times),
        "seconds": statistics.median(ours for _, ours in times),
        "difference": difference(args, density, lists),
    }


def difference(args: argparse.Namespace, density: float, lists: str) -> float:
    """Largest difference from the reference, on a text that is short enough for it."""
    q, k, v = inputs(args, CHECKED_TOKENS)
    blocks = random_blocks(args, CHECKED_TOKENS, density, lists)
    ours, oracle = (ops.attend(q, k, v, blocks, impl=impl)[0].double() for impl in ("torch", "reference"))
    return float((ours - oracle).abs().max())


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    rows, here = measure(args), environment("cpu")
    what = {"tokens": args.tokens, "heads": [args.heads, args.kv_heads], "head_size": args.head_size}
    what |= {"block": args.block, "dtype": args.dtype, "threads": args.threads, "rounds": args.rounds}
    if args.json:
        print(json.dumps({**what, "environment": here, "rows": rows}, indent=1))
        return
    print(f"{here['cpu']}, {args.threads} threads, torch {here['torch']}, python {platform.python_version()}")
    print(", ".join(f"{name} {value}" for name, value in what.items()))
    print("lists of     blocks  pairs  times as fast as dense  (least - largest)  dense s  our s  largest difference")
    for r in rows:
        spread = f"({r['least']:.2f} - {r['largest']:.2f})"
        print(
            f"{r['lists'] + ' heads':11}  {r['density']:6.2f}  {r['pairs']:5.3f}  {r['ratio']:22.2f}  {spread:>17}"
            f"  {r['dense_seconds']:7.3f}  {r['seconds']:5.3f}  {r['difference']:18.1e}"
        )


if __name__ == "__main__":
    main()
