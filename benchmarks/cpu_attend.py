"""How much faster than dense attention `ops.attend` computes random blocks on a CPU, choosing of the blocks included.

    PYTHONPATH=src python benchmarks/cpu_attend.py

Every round times PyTorch's dense causal kernel and each density once, one after the other, so that a slow minute hits
them all; a ratio is of two times of one round. A line for each density: median, least and largest ratio over the
rounds, and the largest difference from the reference on a shorter text. `--json` prints the same for machines.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from saccade import ops
from saccade.core import rng
from saccade.core.selection import Blocks
from saccade.measure.environment import environment

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


def inputs(args: argparse.Namespace, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values."""
    draw = rng.generator("benchmarks/cpu_attend")
    heads = (args.heads, args.kv_heads, args.kv_heads)
    q, k, v = (torch.randn(1, h, tokens, args.head_size, generator=draw) for h in heads)
    dtype = getattr(torch, args.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_blocks(args: argparse.Namespace, tokens: int, density: float) -> Blocks:
    """Of each key/value head's causal blocks the share `density`, the diagonal ones among them; per head of its own."""
    n = -(-tokens // args.block)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    score = torch.rand(1, args.kv_heads, n, n, generator=rng.generator("benchmarks/cpu_attend/blocks"))
    score.diagonal(dim1=-2, dim2=-1).fill_(2)
    score.masked_fill_(~causal, -1)
    keep = torch.zeros_like(score, dtype=torch.bool).flatten(2)
    top = score.flatten(2).topk(max(n, round(density * int(causal.sum()))), -1).indices
    keep = keep.scatter_(-1, top, True).view_as(score).repeat_interleave(args.heads // args.kv_heads, 1)
    return Blocks.of(keep, queries=tokens, keys=tokens, q_block=args.block, k_block=args.block)


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each density."""
    q, k, v = inputs(args, args.tokens)
    dense = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    sparse = [lambda d=d: ops.attend(q, k, v, random_blocks(args, args.tokens, d)) for d in args.densities]
    for work in [dense, *sparse]:
        work()
    rounds = [[seconds(work) for work in [dense, *sparse]] for _ in range(args.rounds)]
    rows = []
    for i, density in enumerate(args.densities, 1):
        ratios = [r[0] / r[i] for r in rounds]
        rows.append(
            {
                "density": density,
                "achieved": float(random_blocks(args, args.tokens, density).density().mean()),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "largest": max(ratios),
                "dense_seconds": statistics.median(r[0] for r in rounds),
                "seconds": statistics.median(r[i] for r in rounds),
                "difference": difference(args, density),
            }
        )
    return rows


def difference(args: argparse.Namespace, density: float) -> float:
    """Largest difference from the reference, on a text that is short enough for it."""
    q, k, v = inputs(args, CHECKED_TOKENS)
    blocks = random_blocks(args, CHECKED_TOKENS, density)
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
    print("density  achieved  times as fast as dense  (least - largest)   dense s     our s  largest difference")
    for r in rows:
        spread = f"({r['least']:.2f} - {r['largest']:.2f})"
        print(
            f"{r['density']:7.2f}  {r['achieved']:8.3f}  {r['ratio']:22.2f}  {spread:>17}  {r['dense_seconds']:8.3f}"
            f"  {r['seconds']:8.3f}  {r['difference']:18.1e}"
        )


if __name__ == "__main__":
    main()
