"""How much faster HyperAttention is than dense attention by cuDNN, on a CUDA device, in the paper's sizes.

    PYTHONPATH=src python benchmarks/gpu_hyperattention.py [--tokens 131072] [--json found.json]

One sequence, 32 heads of 64, bfloat16: the paper's. The whole call is timed: hashing, sorting, drawing, attending and
merging; backward with it. A row is printed after its output was held against a direct formula on some rows; median of
the rounds, the second-level cache overwritten before each.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable

import torch
from gpu_attend import WRONG, both_ways, milliseconds, relative
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade import ops
from saccade.core import rng
from saccade.core.selection import Together
from saccade.core.site import Site
from saccade.measure.environment import environment
from saccade.methods.sparse.hyperattention import HyperAttention

HEADS, SIZE, ROWS = 32, 64, 512


def dense(causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """cuDNN's."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return kernel


def hyper(causal: bool, site: Site) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Ours."""
    method = HyperAttention(sizes="paper")
    select = method.select if causal else method.without_order

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend(q, k, v, select(q, k, site), impl="triton")[0]

    return kernel


def off(out: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: Together) -> float:
    """Error in the last rows of the first head, relative in norm: under the log-weights, in float64."""
    n, rows = q.shape[2], torch.arange(q.shape[2] - ROWS, q.shape[2], device=q.device)
    weights = torch.zeros(ROWS, n, dtype=torch.float64, device=q.device)
    for part, times in zip(selection.parts, selection.times):
        weights += times * seen(part, rows)
    logits = q[0, 0, rows].double() @ k[0, 0].double().T * SIZE**-0.5 + weights.log()
    return relative(out[0, 0, rows].double(), logits.softmax(-1) @ v[0, 0].double())


def seen(part, rows: Tensor) -> Tensor:
    """[rows n] of the first head: which keys they look at."""
    at = torch.arange(part.keys, device=rows.device)
    later = (at > rows[:, None]) & part.causal
    if part.kind == "blocks":
        keep = part.table()[0, 0, rows // part.q_block].repeat_interleave(part.k_block, 1)[:, : part.keys]
        return keep & ~later
    q, k = part.q_bucket[0, 0, rows, None], part.k_bucket[0, 0]
    own = (q // part.family == k // part.family) & (q != k) if part.family else q == k
    return own & (q >= 0) & (k >= 0) & ~later


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the rows there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none.", file=sys.stderr)
        return 3
    rows = []
    for n in args.tokens:
        draw = rng.generator("hyperattention", n, device="cuda")
        made = [torch.randn(1, HEADS, n, SIZE, generator=draw, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        site = Site(layer=0, layers=1, heads=HEADS, kv_heads=HEADS, head_size=SIZE, stage="prefill", queries=n, keys=n,
                    seen=n, scale=SIZE**-0.5)  # fmt: skip
        for causal in (True, False):
            row = {"tokens": n, "causal": causal} | measure(made, site, causal, args.rounds)
            print(row, flush=True)
            rows.append(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rounds": args.rounds, "environment": environment("cuda"), "rows": rows}, file, indent=1)
    return int(any(row["off"] > WRONG for row in rows))


def measure(made: list[Tensor], site: Site, causal: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of both, forward and with backward, and how many times faster ours is."""
    q, k, v, d_out = made
    method = HyperAttention(sizes="paper")
    selection = (method.select if causal else method.without_order)(q, k, site)
    assert isinstance(selection, Together), "so few tokens are computed dense"
    row = {"off": off(hyper(causal, site)(q, k, v), q, k, v, selection)}
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    for name, forward in (("dense", dense(causal)), ("hyper", hyper(causal, site))):
        with torch.no_grad():
            row[name] = statistics.median(milliseconds(functools.partial(forward, q, k, v), rounds))
        row[f"{name} both"] = statistics.median(milliseconds(both_ways(forward, inputs, d_out), rounds))
    return row | {"times": row["dense"] / row["hyper"], "times both": row["dense both"] / row["hyper both"]}


if __name__ == "__main__":
    sys.exit(main())
