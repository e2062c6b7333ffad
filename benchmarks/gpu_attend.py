"""How near `ops.attend` comes to the fastest dense attention on a CUDA device, per pair that is computed.

    PYTHONPATH=src python benchmarks/gpu_attend.py --json found.json

A row for each case: share = TFLOP/s over the pairs that the selection computes (4 D flop each, 2.5 times that
backward), over the same of the fastest dense causal kernel of that length in the same run: FlashAttention-3 where
`fa3-fwd` is installed, else cuDNN; backward cuDNN. The whole call is timed, making of the kernel's lists included;
FlexAttention's time is of its kernel alone, its BlockMask made before. One sequence, 32 query heads on 8 key/value
heads of 128, bfloat16; lists are drawn for each key/value head where a case does not say "per head".

Beside our kernels (triton): FlexAttention (flex), and flash-attn-4 through `impl="flash4"` (fa4) where it is installed
and can compute the case; its lists are made in the time that is measured. "best" is the largest share of the three,
held against a goal of its own.

Each number comes after a check of sampled rows against float64 (backward: of one key/value head against float32), and
is not printed if that fails. Median of the rounds, least and largest; the second-level cache is cleared before each.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade import ops
from saccade.core import rng
from saccade.core.selection import Blocks, Gather, Lines, Selection, Spans
from saccade.measure.environment import environment
from saccade.ops.attend import flash4, flex

HEADS, KV_HEADS, SIZE = 32, 8, 128
GROUP = HEADS // KV_HEADS
BACKWARD = 2.5  # times the work of forward
AHEAD = 0  # cycles that the device is kept busy for before each timed call
WRONG = 1.5e-2  # relative error in norm: bfloat16 gives 2e-3 forward and 4e-3 backward

NAMES = ("triton", "fa4", "flex")

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A row of the table. `goal`: the share for our kernels to reach; `best`: for the best back end installed."""

    name: str
    tokens: int
    make: Callable[[int], Selection]
    goal: float
    best: float | None = None
    backward: bool = False
    flex: bool = True


def cases() -> list[Case]:
    """Those of the project's table of goals."""
    blocks = [
        Case(f"blocks 128 {density:.2f}", n, functools.partial(random_blocks, density=density, block=128), goal, best)
        for n, density, goal, best in (
            (32768, 0.10, 0.75, 0.90), (131072, 0.05, 0.74, 0.84),
            (131072, 0.10, 0.78, 0.90), (131072, 0.25, 0.82, 0.92),
        )
    ]
    back = [
        Case(f"blocks 128 {density:.2f} backward", 32768, functools.partial(random_blocks, density=density, block=128),
             goal, best, backward=True)
        for density, goal, best in ((0.10, 0.66, 0.78), (0.25, 0.74, 0.94))
    ]
    small = functools.partial(random_blocks, density=0.10, block=64)
    apart = functools.partial(random_blocks, density=0.10, block=64, drawn=HEADS)
    pairs, pairs_apart = (functools.partial(random_pairs, drawn=n) for n in (KV_HEADS, HEADS))
    return [
        *blocks,
        *back,
        Case("blocks 64 0.10", 131072, small, 0.65, 0.65, flex=False),
        Case("blocks 64 0.10 per head", 131072, apart, 0.65, 0.65, flex=False),
        Case("lines 1024+1024 per head", 32768, functools.partial(random_lines, many=1024), 0.55, flex=False),
        Case("lines 4096+4096 per head", 131072, functools.partial(random_lines, many=4096), 0.60, flex=False),
        Case("gather 512 of 64-query blocks", 131072, pairs, 0.40, flex=False),
        Case("gather 512 of 64-query blocks per head", 131072, pairs_apart, 0.40, flex=False),
        Case("sinks 4 + window 4096", 131072, sliding, 0.72, 0.83),
    ]


# --- what is computed -----------------------------------------------------------------------------------------------


def inputs(tokens: int, grad: bool = False) -> list[Tensor]:
    """q, k, v of standard normals."""
    draw = rng.generator("benchmarks/gpu_attend", tokens, device="cuda")
    made = [
        torch.randn(1, h, tokens, SIZE, generator=draw, device="cuda", dtype=torch.bfloat16)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    ]
    return [x.requires_grad_(grad) for x in made]


def random_blocks(tokens: int, density: float, block: int, drawn: int = KV_HEADS) -> Blocks:
    """The same number of blocks a row, as a selector chooses them: the first, the diagonal, and others at random."""
    n = tokens // block
    rows = torch.arange(1, n + 1, device="cuda")
    keep = next(c for c in range(1, n + 1) if int(rows.clamp(max=c).sum()) >= density * n * (n + 1) / 2)
    tables = []
    for h in range(drawn):
        score = torch.rand(n, n, generator=rng.generator("blocks", h, n, device="cuda"), device="cuda")
        score[:, 0] = 2
        score = score.masked_fill(rows[None] > rows[:, None], -1)
        score.diagonal().fill_(3)
        value, place = score.topk(keep, -1)
        tables.append(torch.zeros(n, n + 1, dtype=torch.bool, device="cuda")
                      .scatter_(-1, place.masked_fill(value < 0, n), True)[:, :n])
    table = torch.stack(tables)[None]
    made = Blocks.of(table, queries=tokens, keys=tokens, q_block=block, k_block=block)
    crow, col = (x.repeat_interleave(HEADS // drawn, 1) for x in (made.crow, made.col))
    return replace(made, crow=crow, col=col)


def random_lines(tokens: int, many: int) -> Lines:
    """`many` columns anywhere, and the `many` nearest diagonals; per query head."""
    columns = [
        torch.randperm(tokens, generator=rng.generator("lines", h, device="cuda"), device="cuda")[:many].sort().values
        for h in range(HEADS)
    ]
    slashes = torch.arange(many, device="cuda").expand(1, HEADS, -1)
    return Lines(verticals=torch.stack(columns)[None].int(), slashes=slashes.int(), queries=tokens, keys=tokens)


def random_pairs(tokens: int, drawn: int, block: int = 64, many: int = 256) -> Gather:
    """HiP's: for each query block `many` pairs of neighbouring keys at random, ascending."""
    n = tokens // block
    lists = []
    for h in range(drawn):
        score = torch.rand(n, tokens // 2, generator=rng.generator("pairs", h, device="cuda"), device="cuda")
        pair = torch.arange(tokens // 2, device="cuda")
        score = score.masked_fill(pair >= (torch.arange(1, n + 1, device="cuda") * block // 2)[:, None], -1)
        value, place = score.topk(many, -1)
        place = place.masked_fill(value < 0, tokens).sort(-1).values
        keys = (place[..., None] * 2 + torch.arange(2, device="cuda")).flatten(-2)
        lists.append(keys.masked_fill(keys >= tokens, -1).int())
    index = torch.stack(lists)[None].repeat_interleave(HEADS // drawn, 1)
    return Gather(index=index, q_block=block, queries=tokens, keys=tokens)


def sliding(tokens: int) -> Spans:
    """Sinks and a window, one for all heads."""
    return Spans(sinks=torch.tensor([4]), window=torch.tensor([4096]), queries=tokens, keys=tokens)


# --- right? ---------------------------------------------------------------------------------------------------------


def of_row(selection: Selection, head: int, row: int) -> Tensor:
    """The keys that a row looks at."""
    match selection:
        case Blocks():
            i, crow = row // selection.q_block, selection.crow[0, head]
            blocks = selection.col[0, head, crow[i] : crow[i + 1]].long()
            keys = (blocks[:, None] * selection.k_block + torch.arange(selection.k_block, device="cuda")).flatten()
        case Gather():
            keys = selection.index[0, head, row // selection.q_block].long()
        case Lines():
            end = (row // selection.block + 1) * selection.block
            near = torch.arange(near_start(selection, end), end, device="cuda")
            columns = selection.verticals[0, head].long()
            keys = torch.cat([columns[columns < near[0]], near])
        case Spans():
            window, sinks = int(selection.window[0]), int(selection.sinks[0])
            every = torch.arange(row + 1, device="cuda")
            keys = every[(every > row - window) | (every < sinks)]
        case _:
            raise AssertionError(selection.kind)
    return keys[(keys >= 0) & (keys <= row)]


def near_start(selection: Lines, end: int) -> int:
    """First key of the run that consecutive diagonals make: steps of `block`, from the farthest band's first key."""
    block, farthest = selection.block, selection.slashes.shape[-1] - 1
    return max(end - farthest, block) - block


def wrong(out: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> float:
    """Relative error of sampled rows."""
    n, found, exact = q.shape[2], [], []
    for head, row in ((0, n - 1), (HEADS // 2, n // 3 + 17), (HEADS - 1, n // 2 + 5), (5, 300), (HEADS - 1, n - 129)):
        keys = of_row(selection, head, row)
        logits = k[0, head // GROUP, keys].double() @ q[0, head, row].double() * SIZE**-0.5
        exact.append(logits.softmax(0) @ v[0, head // GROUP, keys].double())
        found.append(out[0, head, row].double())
    return relative(torch.stack(found), torch.stack(exact))


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def wrong_gradients(grads: list[Tensor], q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, selection: Blocks | None):
    """Largest relative error of dq, dk and dv of the last key/value head, against float32 in pieces."""
    n, step, block = q.shape[2], 2048, 128
    kf, vf = k[0, -1].detach().float(), v[0, -1].detach().float()
    dk, dv, off = torch.zeros_like(kf), torch.zeros_like(vf), 0.0
    place = torch.arange(n, device="cuda")
    for head in range(HEADS - GROUP, HEADS):
        table = None if selection is None else replace(
            selection, crow=selection.crow[:, head : head + 1], col=selection.col[:, head : head + 1]
        ).table()[0, 0]
        dq = torch.empty_like(q[0, head], dtype=torch.float32)
        for i in range(0, n, step):
            j = i + step
            rows, d = q[0, head, i:j].detach().float(), d_out[0, head, i:j].float()
            seen = place[i:j, None] >= place[:j]
            if table is not None:
                part = table[i // block : j // block, : j // block]
                seen &= part.repeat_interleave(block, 0).repeat_interleave(block, 1)
            p = (rows @ kf[:j].T * SIZE**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            dp = d @ vf[:j].T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * SIZE**-0.5
            dq[i:j] = ds @ kf[:j]
            dk[:j] += ds.T @ rows
            dv[:j] += p.T @ d
        off = max(off, relative(grads[0][0, head], dq))
    return max(off, relative(grads[1][0, -1], dk), relative(grads[2][0, -1], dv))


# --- how fast? ------------------------------------------------------------------------------------------------------


def milliseconds(work: Run, rounds: int) -> list[float]:
    """Of each round, after two that warm up; the cache is overwritten before each."""
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    found = []
    for _ in range(rounds + 2):
        cache.zero_()
        if AHEAD:  # the device is busy while the host gives it the call
            torch.cuda._sleep(AHEAD)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return found[2:]


def both_ways(forward: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor) -> Run:
    """Forward and backward."""
    return lambda: torch.autograd.grad(forward(*inputs), inputs, d_out)


def speed(pairs: float, times: list[float], backward: bool) -> dict[str, float]:
    """TFLOP/s: median, least, largest; and the median time."""
    work = 4 * SIZE * pairs * (BACKWARD if backward else 1) / 1e9
    return {
        "tflops": work / statistics.median(times),
        "least": work / max(times),
        "largest": work / min(times),
        "ms": statistics.median(times),
    }


def by_torch(back_end: SDPBackend) -> Callable[..., Tensor]:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(back_end):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return kernel


def fa4_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)[0].transpose(1, 2)


def fla_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.attn import parallel_attn

    return parallel_attn(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)


def dense_kernels(backward: bool, peers: bool) -> dict[str, Callable[..., Tensor]]:
    """What is there to compare with; `peers`: also what is known not to be the fastest."""
    found = {"cudnn": by_torch(SDPBackend.CUDNN_ATTENTION)}
    if peers:
        found["flash"] = by_torch(SDPBackend.FLASH_ATTENTION)
        if flash4.installed() is not None:
            found["fa4"] = fa4_dense
        if importlib.util.find_spec("fla") is not None:
            found["fla"] = fla_dense
    if not backward and importlib.util.find_spec("fa3_fwd_interface") is not None:
        import fa3_fwd_interface

        def fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = fa3_fwd_interface.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found["fa3"] = fa3
    return found


def whole(tokens: int) -> Spans:
    """Every pair."""
    return Spans(sinks=torch.tensor([0]), window=torch.tensor([tokens]), queries=tokens, keys=tokens)


def dense(tokens: int, backward: bool, rounds: int, peers: bool) -> tuple[str, dict[str, Any]]:
    """The fastest dense kernel that is right, and what was found of each."""
    pairs, found = HEADS * tokens * (tokens + 1) / 2, {}
    q, k, v = inputs(tokens, backward)
    for name, kernel in dense_kernels(backward, peers).items():
        forward = functools.partial(kernel, q, k, v)
        found[name] = timed(forward, q, k, v, whole(tokens), pairs, backward, rounds)
    right = {name: row for name, row in found.items() if "tflops" in row}
    return max(right, key=lambda n: right[n]["tflops"]), found


def timed(
    forward: Run, q: Tensor, k: Tensor, v: Tensor, selection: Selection, pairs: float, backward: bool, rounds: int
) -> dict[str, Any]:
    """Speed and error of a kernel, or {"wrong": error}, or {"failed": why}: the others are measured all the same."""
    try:
        work, off = prepared(forward, q, k, v, selection, backward)
        if not off <= WRONG:
            return {"wrong": off}
        return speed(pairs, milliseconds(work, rounds), backward) | {"relative_error": off}
    except Exception:
        return {"failed": traceback.format_exc(limit=-3)}


def prepared(forward: Run, q: Tensor, k: Tensor, v: Tensor, selection: Selection, backward: bool) -> tuple[Run, float]:
    """What is to be timed, and its relative error."""
    if not backward:
        with torch.no_grad():
            off = wrong(forward(), q, k, v, selection)
        return torch.no_grad()(forward), off
    out = forward()
    d_out = torch.randn(out.shape, generator=rng.generator("d_out", device="cuda"), device="cuda", dtype=out.dtype)

    def back() -> list[Tensor]:
        return list(torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))

    table = selection if isinstance(selection, Blocks) else None
    return back, wrong_gradients(back(), q, k, v, d_out, table)


def by_flex(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Run:
    """FlexAttention over the same selection; its mask is made here, outside of what is timed."""
    mask = (flex._blocks if isinstance(selection, Blocks) else flex._spans)(selection, q.device)
    return lambda: flex._compiled()(q, k, v, block_mask=mask, enable_gqa=True)


def measure(case: Case, references: dict, args: argparse.Namespace) -> dict[str, Any]:
    """A row."""
    if (key := (case.tokens, case.backward)) not in references:
        references[key] = dense(case.tokens, case.backward, args.rounds, args.peers)
    best, kernels = references[key]
    q, k, v = inputs(case.tokens, case.backward)
    selection = case.make(case.tokens)
    pairs = float(selection.count().expand(1, HEADS).sum())
    whole_pairs = HEADS * case.tokens * (case.tokens + 1) / 2
    row = {"case": case.name, "tokens": case.tokens, "goal": case.goal, "goal_best": case.best}
    row |= {"density": pairs / whole_pairs, "dense": best, "dense_tflops": kernels[best]["tflops"]}
    row |= {"dense_kernels": kernels}
    why = ops.explain(lambda: ops.attend(q, k, v, selection))["flash4"]
    runs = {"triton": lambda: ops.attend(q, k, v, selection, impl="triton")[0]}
    if not why:
        runs["fa4"] = lambda: ops.attend(q, k, v, selection, impl="flash4")[0]
    if case.flex and not args.no_flex:
        runs["flex"] = by_flex(q, k, v, selection)
    found = {n: timed(run, q, k, v, selection, pairs, case.backward, args.rounds) for n, run in runs.items()}
    for name, one in found.items():
        row[name] = one | ({"share": one["tflops"] / kernels[best]["tflops"]} if "tflops" in one else {})
    return row | ({"fa4": {"cannot": why}} if why else {}) | {"best": best_share(row)}


def best_share(row: dict[str, Any]) -> dict[str, Any]:
    """The back end that comes nearest to dense, and how near."""
    shares = {name: row[name]["share"] for name in NAMES if "share" in row.get(name, {})}
    name = max(shares, key=lambda n: shares[n], default=None)
    return {"back_end": name, "share": shares.get(name)}


def line(row: dict[str, Any]) -> str:
    """For people."""
    text = f"{row['case']:40} {row['tokens']:>7} {row['density']:6.3f}  {row['dense']:5} {row['dense_tflops']:4.0f}"
    text += "".join(f"  {name} {said(row[name])}" for name in NAMES if name in row) + f"  goal {row['goal']:.2f}"
    if row["best"]["back_end"] and row["goal_best"]:
        text += f"  best {row['best']['back_end']} {row['best']['share']:.2f} goal {row['goal_best']:.2f}"
    others = {n: said(one) for n, one in row["dense_kernels"].items() if n != row["dense"]}
    return text + "".join(f"\n    dense {name} {what}" for name, what in others.items())


def said(found: dict[str, Any]) -> str:
    """Of one kernel."""
    if "wrong" in found:
        return f"WRONG by {found['wrong']:.2g}"
    if "failed" in found:
        return f"FAILED: {found['failed'].strip().splitlines()[-1][:80]}"
    if "cannot" in found:
        return f"cannot: {found['cannot'][0]}"
    share = f" share {found['share']:.2f}" if "share" in found else ""
    return f"{found['ms']:8.3f} ms {found['tflops']:4.0f} ({found['least']:.0f} - {found['largest']:.0f}){share}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--tokens", type=int, help="cases of this length only")
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--peers", action="store_true", help="dense flash-attn-4, fla and PyTorch's flash kernel too")
    parser.add_argument("--ahead", type=int, default=0, metavar="CYCLES", help="keep the device busy for so long before"
                        " each timed call, so that the time of the host does not count: 4000000 is 2 ms")
    parser.add_argument("--plain", action="store_true", help="forward without the warp-specialised form")
    parser.add_argument("--json", help="write the rows there too")
    return parser.parse_args()


def main() -> int:
    global AHEAD
    args = arguments()
    AHEAD = args.ahead
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none.", file=sys.stderr)
        return 3
    from saccade.ops.attend.triton import launch

    if args.plain:
        launch.SPECIAL = False
    functorch.donated_buffer = False  # FlexAttention's gradients are computed many times over
    rows, references, bad = [], {}, 0
    for case in cases():
        if args.only not in case.name or args.tokens not in (None, case.tokens):
            continue
        try:
            rows.append(measure(case, references, args))
            print(line(rows[-1]), flush=True)
        except Exception:
            bad += 1
            print(f"{case.name}: failed\n{traceback.format_exc(limit=-3)}", flush=True)
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            what = {"rounds": args.rounds, "special": launch.SPECIAL, "ahead": AHEAD}
            what |= {"flash-attn-4": flash4.installed(), "environment": environment("cuda")}
            json.dump(what | {"rows": rows}, file, indent=1)
    return int(bad > 0 or any("share" not in row["triton"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
