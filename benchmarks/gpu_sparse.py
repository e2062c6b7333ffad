"""What choosing costs: whole sparse attention of one layer, the choice included, beside dense kernels on a CUDA device.

    PYTHONPATH=src python benchmarks/gpu_sparse.py [--lengths 32768 131072] [--json found.json]

One sequence, 32 query and 8 key/value heads of 128, bfloat16, standard normals. For each method: milliseconds of
choosing, of all of it (with --backward both ways), how many times faster that is than each dense kernel that is
installed (PyTorch's flash kernel is FlashAttention-2), and `cost`: choosing over what attention saves against the
fastest dense one. A row is printed after sampled rows of its output were held against float64. Gates of seer-attention
are drawn at random; median of the rounds, the second-level cache overwritten before each, and the device kept busy
(--ahead), so that the host's part is hidden unless a call waits for the device: in a model the host runs ahead too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import gpu_attend
import torch
from gpu_attend import HEADS, KV_HEADS, SIZE, WRONG, Run, both_ways, dense_kernels, inputs, milliseconds, wrong
from torch import Tensor

from saccade import ops
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.selection import Blocks, Gather, Lines
from saccade.core.site import Site
from saccade.measure.environment import environment
from saccade.methods.sparse.flexprefill import Flexprefill
from saccade.methods.sparse.moba import Moba
from saccade.methods.sparse.s2_attention import S2Attention
from saccade.methods.sparse.seer_attention import SeerAttention, stored
from saccade.methods.sparse.xattention import Xattention

METHODS: dict[str, tuple[Callable[[], Any], Budget]] = {
    "seer-attention@0.1": (lambda: SeerAttention(artefact=gates()), Budget(0.1)),
    "seer-attention:block_tokens=128@0.1": (lambda: SeerAttention(artefact=gates(), block_tokens=128), Budget(0.1)),
    "s2-attention:local_blocks=8,vert_stride=16": (lambda: S2Attention(local_blocks=8, vert_stride=16), Budget(1.0)),
    "xattention@0.1": (Xattention, Budget(0.1)),
    "flexprefill@0.1": (Flexprefill, Budget(0.1)),
    "moba@0.1": (Moba, Budget(0.1)),
}


def gates() -> Artefact:
    """Of seer-attention, for one layer."""
    draw = rng.generator("benchmarks/gpu_sparse")
    return Artefact("seer-attention", stored({"keys": torch.randn(1, HEADS, 3 * SIZE, SIZE, generator=draw)}), "", "")


def turn(x: Tensor, shifts: Tensor) -> Tensor:
    """Rotary positions, as Llama has them."""
    angle = shifts.float()[:, None] * 5e5 ** (-torch.arange(0, SIZE, 2, device=x.device) / SIZE)
    cos, sin = (t.repeat(1, 2).to(x.dtype) for t in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1) * sin


def site_of(tokens: int, budget: Budget) -> Site:
    """The only layer of a model."""
    return Site(layer=0, layers=1, heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, stage="prefill", queries=tokens,
                keys=tokens, seen=tokens, scale=SIZE**-0.5, budget=budget, turn=turn)  # fmt: skip


def median(work: Run, rounds: int) -> float:
    return statistics.median(milliseconds(work, rounds))


def dense(tokens: int, rounds: int, backward: bool) -> dict[str, float]:
    """Milliseconds of each dense kernel."""
    made = inputs(tokens, grad=backward)
    d_out = torch.randn_like(made[0])
    found = {}
    for name, kernel in dense_kernels(backward, peers=True).items():
        work = both_ways(kernel, made, d_out) if backward else functools.partial(kernel, *made)
        found[name] = median(work, rounds)
    return found


def measure(name: str, tokens: int, rounds: int, backward: bool, dense_ms: dict[str, float]) -> dict[str, Any]:
    """A row."""
    make, budget = METHODS[name]
    method, site, made = make(), site_of(tokens, budget), inputs(tokens, grad=backward)
    q, k, v = made

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend(q, k, v, method.select(q.detach(), k.detach(), site), impl="triton")[0]

    with torch.no_grad():
        selection = method.select(q, k, site)
        pairs = float(selection.count().expand(1, HEADS).sum())
        off = None
        if isinstance(selection, (Blocks, Gather, Lines)):
            off = wrong(attention(q, k, v), q, k, v, expanded(selection))
        choose = median(lambda: method.select(q, k, site), rounds)
        whole = median(lambda: attention(q, k, v), rounds)
    fastest = min(dense_ms.values())
    row = {"method": name, "tokens": tokens, "density": pairs / (HEADS * tokens * (tokens + 1) / 2), "off": off,
           "kind": selection.kind, "choose_ms": choose, "ms": whole}  # fmt: skip
    if backward:
        row["ms"] = median(both_ways(attention, made, torch.randn_like(q)), rounds)
    saved = fastest - (row["ms"] - choose)
    times = {n: ms / row["ms"] for n, ms in dense_ms.items()}
    return row | {"times": times, "cost": choose / saved if saved > 0 else None}


def expanded(selection: Blocks | Gather | Lines) -> Any:
    """With lists of every query head, which is what rows are looked up in."""
    lists = {n: x for n, x in vars(selection).items() if isinstance(x, Tensor)}
    return dataclasses.replace(selection, **{n: x.repeat_interleave(HEADS // x.shape[1], 1) for n, x in lists.items()})


def line(row: dict[str, Any]) -> str:
    """For people."""
    times = ", ".join(f"{n} {x:.2f}x" for n, x in row["times"].items())
    cost = "saves nothing" if row["cost"] is None else f"cost {row['cost']:.3f}"
    off = "not held" if row["off"] is None else f"off {row['off']:.1e}"
    return (f"{row['method']:44} {row['tokens']:7} density {row['density']:.3f} choosing {row['choose_ms']:.3f} of"
            f" {row['ms']:.3f} ms; {times}; {cost}; {off}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ahead", type=int, default=10_000_000, help="cycles the device is kept busy before a call")
    parser.add_argument("--json", help="write the rows there too")
    args = parser.parse_args()
    gpu_attend.AHEAD = args.ahead
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none.", file=sys.stderr)
        return 3
    rows, kernels = [], {}
    for tokens in args.lengths:
        kernels[tokens] = dense(tokens, args.rounds, args.backward)
        print(tokens, {name: round(ms, 3) for name, ms in kernels[tokens].items()}, flush=True)
        for name in args.methods:
            rows.append(measure(name, tokens, args.rounds, args.backward, kernels[tokens]))
            print(line(rows[-1]), flush=True)
    if args.json:
        asked = {"rounds": args.rounds, "ahead": args.ahead, "backward": args.backward}
        with open(args.json, "w") as file:
            json.dump(asked | {"dense_ms": kernels, "rows": rows, "environment": environment("cuda")}, file, indent=1)
    return int(any(row["off"] is not None and row["off"] > WRONG for row in rows))


if __name__ == "__main__":
    sys.exit(main())
