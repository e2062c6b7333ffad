"""Decoding and choosing on a CUDA device, beside PyTorch on the same data in the same run.

    PYTHONPATH=src python benchmarks/gpu_decode.py                     # the table
    PYTHONPATH=src python benchmarks/gpu_decode.py --only gather step --out FILE.json
    PYTHONPATH=src python benchmarks/gpu_decode.py --tune gather       # other cuts of the same work

Times are of CUDA graph replays, the L2 cache filled with other data before each: median, and the 20th and 80th of a
hundred. First with data that was written (as triton.testing.do_bench does): what is measured then also waits for up to
50 MB of it to be written back, some 12 us on an H200, whoever computes. `clean` is the median with data that was only
read, as the weights of a model are. `rb` is the bytes that must move over the time, over the bandwidth of a large copy
in the same run (read and write counted); goals are for the first. Before a time is taken the result is compared with
float64 at a few heads: its error may be at most twice that of PyTorch on the same data. A result that is wrong has no
time. 32 query heads, 8 key/value heads, size 128, bfloat16.
"""

# ruff: noqa: B023  (what a loop defines is run before the loop goes on)
from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from saccade import ops
from saccade.core import rng
from saccade.ops.column_scores import triton as columns
from saccade.ops.decode import quantised
from saccade.ops.decode import triton as decoding
from saccade.ops.page_bounds import triton as bounds
from saccade.ops.pool_and_select import triton as pooling
from saccade.ops.topk import long
from saccade.ops.topk import triton as choosing

HEADS, KV, SIZE, PAGE = 32, 8, 128, 16
ONCE = False
GROUP = HEADS // KV
LOOKED_AT = (0, 11, 31)  # heads that are compared with float64


@dataclass
class Row:
    """A figure of one implementation, or why there is none."""

    row: str
    by: str
    goal: str = ""
    microseconds: float | None = None
    spread: tuple[float, float] | None = None
    clean: float | None = None
    rb_clean: float | None = None
    rb: float | None = None
    error: float | None = None
    allowed: float | None = None
    note: str = ""


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normals on the device."""
    seed = rng.generator("benchmarks/gpu_decode", 0, *shape).initial_seed()
    return torch.randn(shape, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(seed))


def cache(batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """A query, keys and values."""
    return draw(batch, HEADS, 1, SIZE), draw(batch, KV, keys, SIZE), draw(batch, KV, keys, SIZE) * 0.5


def microseconds(work: Callable[[], object]) -> list[float]:
    """Median, 20th and 80th percentile of graph replays after writing, median after reading."""
    if ONCE:
        work()
        return [0.0] * 4
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    room = torch.zeros(2**26, device="cuda")
    written, read = (replays(graph, fill) for fill in (room.zero_, room.sum))
    return [*(written[round(share * (len(written) - 1))] for share in (0.5, 0.2, 0.8)), read[len(read) // 2]]


def replays(graph: torch.cuda.CUDAGraph, fill: Callable[[], object], times: int = 100) -> list[float]:
    """Microseconds of each, ascending, after something else has filled the L2 cache."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times + 5)]
    for start, end in events:
        fill()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(1000 * start.elapsed_time(end) for start, end in events[5:])


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second of a large copy, reading and writing counted."""
    x = torch.empty(2**31, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    times = triton.testing.do_bench(lambda: y.copy_(x), warmup=10, rep=60, return_mode="median")
    return 2 * x.numel() / times * 1000


def distance(ours: Tensor, exact: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite for a NaN."""
    ours, exact = ours.double(), exact.double()
    return float(((ours - exact).norm() / exact.norm()).nan_to_num(torch.inf))


def timed(row: str, by: str, work: Callable[[], Any], goal: str = "", moved: int = 0, **check: Any) -> Row:
    """Check, then measure. check: found (what to compare, from a result), exact, allowed (error)."""
    out = Row(row, by, goal)
    try:
        if check:
            out.error, out.allowed = distance(check["found"](work()), check["exact"]), check["allowed"]
            if not out.error <= out.allowed:
                out.note = "WRONG"
                return out
        out.microseconds, *spread, out.clean = microseconds(work)
        out.spread = (spread[0], spread[1])
        if moved and not ONCE:
            out.rb, out.rb_clean = (moved / t * 1e6 / copy_bandwidth() for t in (out.microseconds, out.clean))
    except (RuntimeError, ValueError, triton.CompilationError) as error:
        out.note = f"{type(error).__name__}: {str(error)[:160]}"
    return out


def exact_heads(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None = None) -> Tensor:
    """Attention of the first and last sequence at a few heads, in float64."""
    out = []
    for b in (0, q.shape[0] - 1):
        for h in LOOKED_AT:
            keys, values = k[b, h // GROUP], v[b, h // GROUP]
            if index is not None:
                keys, values = (x[index[b, h // GROUP, 0].long()] for x in (keys, values))
            weights = (keys.double() @ q[b, h, 0].double() * SIZE**-0.5).softmax(0)
            out.append(weights @ values.double())
    return torch.stack(out)


def heads(out: Tensor) -> Tensor:
    """The same heads of a result."""
    return torch.stack([out[b, h, 0] for b in (0, out.shape[0] - 1) for h in LOOKED_AT])


def first(pair: tuple[Tensor, ...]) -> Tensor:
    """The heads of an output that came with its lse."""
    return heads(pair[0])


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's choice."""
    return sdpa(q, k, v, enable_gqa=True)


def lists(batch: int, entries: int, keep: int) -> Tensor:
    """Ascending, of random entries, for each key/value head."""
    score = draw(batch, KV, 1, entries, dtype=torch.float32)
    return ops.topk(score, keep, impl="torch")


def dense(args: argparse.Namespace) -> Iterator[Row]:
    for batch, keys in ((1, 32768), (1, 131072), (8, 32768), (8, 131072)):
        q, k, v = cache(batch, keys)
        name, exact, moved = f"decode dense {batch} x {keys}", exact_heads(q, k, v), 2 * k.nbytes
        allowed = 2 * distance(heads(plain(q, k, v)), exact)
        check = {"exact": exact, "allowed": allowed, "moved": moved}
        goal = "within 3 % of the best" if k.nbytes >= 2**28 else ""
        yield timed(name, "triton", lambda: ops.decode(q, k, v, impl="triton"), goal, found=first, **check)
        yield timed(name, "torch sdpa", lambda: plain(q, k, v), found=heads, **check)
        if args.tune:
            for cut in cuts(batch * KV, keys, (1, 2, 3, 4)):
                work = functools.partial(decoding.decode, q, k, v, None, None, scale=SIZE**-0.5, softcap=None, how=cut)
                yield timed(name, describe(cut), work, found=first, **check)


CUTS = ((32, 4, 5), (64, 4, 3), (64, 4, 4), (64, 4, 5), (32, 1, 3), (32, 1, 4), (32, 2, 4), (64, 2, 3))


def cuts(jobs: int, entries: int, waves: tuple[int, ...]) -> Iterator[decoding.Plan]:
    """Other plans of the same work."""
    for block, warps, stages in CUTS:
        for wave in waves:
            parts = max(1, min(decoding.MOST_PARTS, wave * 132 // jobs, triton.cdiv(entries, block)))
            chunk = triton.cdiv(triton.cdiv(entries, parts), block) * block
            yield decoding.Plan(block, triton.cdiv(entries, chunk), chunk, warps, stages)


def describe(how: Any) -> str:
    """A plan in a line."""
    return " ".join(f"{name[:6]}={value}" for name, value in asdict(how).items())


def gather(args: argparse.Namespace) -> Iterator[Row]:
    goals = {(1, 131072, 4096): "16 us", (8, 131072, 4096): "rb 0.72", (32, 32768, 2048): "rb 0.85"}
    for (batch, keys, keep), goal in goals.items():
        q, k, v = cache(batch, keys)
        index = lists(batch, keys, keep)
        place = index[:, :, 0, :, None].long().expand(-1, -1, -1, SIZE)
        name, exact = f"decode gather {batch} x {keep} of {keys}", exact_heads(q, k, v, index)
        moved = 2 * index.numel() * SIZE * 2 + index.nbytes

        def copied(q=q, k=k, v=v, place=place) -> Tensor:
            return plain(q, k.gather(2, place), v.gather(2, place))

        check = {"exact": exact, "allowed": 2 * distance(heads(copied()), exact), "moved": moved}
        yield timed(name, "triton", lambda: ops.decode(q, k, v, index, impl="triton"), goal, found=first, **check)
        yield timed(name, "torch gather + sdpa", copied, found=heads, **check)
        if args.tune:
            for cut in cuts(batch * KV, keep, (3, 5)):
                work = functools.partial(decoding.decode, q, k, v, index, None, scale=SIZE**-0.5, softcap=None, how=cut)
                yield timed(name, describe(cut), work, found=first, **check)


def pages(args: argparse.Namespace) -> Iterator[Row]:
    for batch, goal in ((1, "rb 0.50"), (8, "rb 0.75")):
        q, k, _ = cache(batch, 131072)
        low, high = ops.page_bounds(k, PAGE)
        wide = q[:1].double(), low[:1].double(), high[:1].double()
        exact = ops.page_scores(*wide, by_group=True, impl="torch")
        name, moved = f"page scores {batch} x 131072", 2 * low.nbytes
        check = {"exact": exact, "allowed": 1e-5, "found": lambda x: x[:1], "moved": moved}
        yield timed(name, "triton", lambda: ops.page_scores(q, low, high, by_group=True, impl="triton"), goal, **check)
        yield timed(name, "torch", lambda: ops.page_scores(q, low, high, by_group=True, impl="torch"), **check)
        if args.tune:
            for block, warps in ((32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8), (256, 8)):
                work = functools.partial(bounds.page_scores, q, low, high, True, block, warps)
                yield timed(name, f"block={block} warps={warps}", work, **check)
        yield timed(f"page bounds of keys {batch} x 131072", "triton", lambda: ops.page_bounds(k, PAGE), moved=k.nbytes)


def top(args: argparse.Namespace) -> Iterator[Row]:
    shapes = [(8, 8192, 256), (64, 8192, 256), (32, 131072, 2048), (32768, 1024, 64)]
    shapes += [(rows, n, 4096) for n in (131072, 524288) for rows in (8, 64)] + [(64, 131072, 8192)]
    for rows, n, keep in shapes:
        x = draw(rows, n, dtype=torch.float32)
        exact = ops.topk(x, keep, impl="reference")
        check = {"exact": exact, "allowed": 0.0, "found": lambda i: i, "moved": x.nbytes}
        yield timed(f"top {keep} of {rows} x {n}", "triton", lambda: ops.topk(x, keep, impl="triton"), **check)
        if n == 8192:
            yield timed(f"top {n} of {rows} x {n}", "triton, no search", lambda: ops.topk(x, n, impl="triton"))
        for few in (2, 4, 8) if args.tune and n <= choosing.TILE else ():
            work = functools.partial(choosing.topk, x, keep, few=few)
            yield timed(f"top {keep} of {rows} x {n}", f"warps={few}", work, **check)
        for how in long_cuts(n, keep) if args.tune and n > choosing.TILE else ():
            work = functools.partial(long.topk, x, keep, how)
            yield timed(f"top {keep} of {rows} x {n}", describe(how), work, **check)
        yield timed(f"top {keep} of {rows} x {n}", "torch.topk alone", lambda: x.topk(keep, -1, sorted=False))
        # not compared: of equal scores at the edge it takes any
        yield timed(f"top {keep} of {rows} x {n}", "torch, ascending", lambda: ops.topk(x, keep, impl="torch"))


def long_cuts(n: int, keep: int) -> Iterator[long.Plan]:
    """Other plans for long rows: each size by itself, beside those of the plan in use."""
    own = long.plan(n, keep)
    cuts = ((2048, 512, 4), (4096, 512, 4), (4096, 1024, 8), (4096, 256, 8), (8192, 512, 8), (8192, 1024, 16))
    for part, step, warps in cuts:
        yield replace(own, part=part, step=step, part_warps=warps)
    for sample, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 16), (8192, 8), (8192, 16)):
        yield replace(own, sample=sample, sample_warps=warps)
    for tile, warps in ((8192, 4), (8192, 16), (16384, 8), (16384, 16)):
        if tile > keep:
            yield replace(own, tile=tile, tile_warps=warps)


def step(args: argparse.Namespace) -> Iterator[Row]:
    for batch in (1, 8):
        q, k, v = cache(batch, 131072)
        low, high = ops.page_bounds(k, PAGE)
        index = ops.topk(ops.page_scores(q, low, high, by_group=True), 4096 // PAGE)
        tokens = (index.long()[..., None] * PAGE + torch.arange(PAGE, device="cuda")).flatten(-2)
        exact = exact_heads(q, k, v, tokens)
        shape = {"page_tokens": PAGE, "keep_pages": 4096 // PAGE}

        def torch_alone(q=q, k=k, v=v, low=low, high=high) -> Tensor:
            scores = ops.page_scores(q, low, high, by_group=True, impl="torch")
            best = scores.topk(4096 // PAGE, -1).indices
            place = (best[..., None] * PAGE + torch.arange(PAGE, device="cuda")).flatten(-2)[:, :, 0, :, None]
            place = place.expand(-1, -1, -1, SIZE)
            return plain(q, k.gather(2, place), v.gather(2, place))

        moved = 2 * low.nbytes + 2 * tokens.numel() * SIZE * 2
        check = {"exact": exact, "allowed": 2 * distance(heads(torch_alone()), exact), "moved": moved}
        name, goal = f"sparse step {batch} x 4096 of 131072", "35 us" if batch == 1 else ""
        work = functools.partial(ops.sparse_step, q, k, v, low, high, impl="triton", **shape)
        yield timed(name, "triton", work, goal, found=first, **check)
        yield timed(name, "torch", torch_alone, found=heads, **check)
        yield timed(name, "attend alone", lambda: ops.decode(q, k, v, index, page_tokens=PAGE), found=first, **check)


def small(args: argparse.Namespace) -> Iterator[Row]:
    for batch in (1, 8):
        q, k, v = cache(batch, 131072)
        for bits, goal in ((8, "rb 0.80"), (4, "rb 0.55")):
            codes = [ops.quantise(x, bits) for x in (k, v)]
            spelt = [ops.dequantise(x) for x in codes]
            exact = exact_heads(q, *spelt)
            check = {"exact": exact, "allowed": 2 * distance(heads(plain(q, *spelt)), exact), "found": first}
            check["moved"] = sum(x.bytes for x in codes)
            name = f"decode int{bits} {batch} x 131072"
            yield timed(
                name, "triton", lambda: ops.decode(q, *codes, impl="triton"), goal if batch == 8 else "", **check
            )
            if args.tune:
                for cut in cuts(batch * KV, 131072, (4, 8)):
                    options = {"scale": SIZE**-0.5, "softcap": None, "how": cut}
                    work = functools.partial(quantised.decode, q, *codes, None, **options)
                    yield timed(name, describe(cut), work, **check)
            del codes, spelt


def sums(args: argparse.Namespace) -> Iterator[Row]:
    q, k = draw(1, HEADS, 64, SIZE), draw(1, KV, 131072, SIZE)
    few = q[:, ::16].double(), k[:, ::4].double()
    exact = ops.column_scores(*few, impl="reference")
    check = {"exact": exact, "allowed": 1e-4, "moved": 2 * k.nbytes}
    yield timed("column_scores 64 of 131072", "triton", lambda: ops.column_scores(q, k, impl="triton"), "500 us",
                found=lambda x: x[:, ::16], **check)  # fmt: skip
    yield timed("column_scores 64 of 131072", "torch", lambda: ops.column_scores(q, k, impl="torch"),
                found=lambda x: x[:, ::16], **check)  # fmt: skip
    check["exact"] = ops.line_scores(few[0].float(), few[1].float(), impl="torch")[1]
    yield timed("line_scores 64 of 131072", "triton", lambda: ops.line_scores(q, k, impl="triton"),
                found=lambda x: x[1][:, ::16], **check)  # fmt: skip
    if args.tune:
        check["exact"] = exact
        for rows, keys, warps, stages in ((128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3)):
            for tile, tile_warps in ((128, 4), (64, 4), (64, 2)):
                how = columns.Plan(rows, keys, warps, stages, tile, tile_warps)
                work = functools.partial(columns.line_sums, q, k, scale=SIZE**-0.5, softcap=None, causal=True, how=how)
                for lines in (False, True):
                    yield timed(f"column sums, lines={lines}", describe(how), functools.partial(work, lines=lines),
                                found=lambda x: x[0][:, ::16], **check)  # fmt: skip


def choose(args: argparse.Namespace) -> Iterator[Row]:
    q, k = draw(1, HEADS, 131072, SIZE), draw(1, KV, 131072, SIZE)
    for block in (128, 64):
        options = {"keep_blocks": 8192 // block, "q_block": block, "k_block": block}
        name = f"choose {options['keep_blocks']} of {131072 // block} blocks of {block}"
        pooled = [ops.pool_blocks(x, block)[:, ::n] for x, n in ((q, 16), (k, 4))]
        exact = kept_scores(ops.pool_and_select(q, k, impl="torch", **options), *pooled)
        check = {
            "exact": exact,
            "allowed": 1e-3,
            "found": lambda s: kept_scores(s, *pooled),
            "moved": q.nbytes + k.nbytes,
        }
        yield timed(name, "triton", lambda: ops.pool_and_select(q, k, impl="triton", **options), "700 us", **check)
        for warps in (2, 4, 8) if args.tune else (2,):
            work = functools.partial(pooling.pool, q, block, True, warps)
            yield timed(name, f"pooling q alone, {warps} warps", work, moved=q.nbytes)
        work = functools.partial(torch_choice, q, k, block, 8192 // block)
        yield timed(name, "torch, pooling to top-k", work, moved=q.nbytes + k.nbytes)


def torch_choice(q: Tensor, k: Tensor, block: int, keep: int) -> Tensor:
    """Mean-pooled scores in bfloat16, top-k; no lists."""
    pooled = [x.unflatten(2, (-1, block)).mean(3) for x in (q, k)]
    return (pooled[0] @ pooled[1].repeat_interleave(GROUP, 1).mT).topk(keep, -1).indices


def kept_scores(blocks: Any, pooled_q: Tensor, pooled_k: Tensor) -> Tensor:
    """Sums of the scores that each row of two heads kept: the same whichever of equal ones were taken."""
    table = blocks.table()[:, ::16]
    return torch.where(table, (pooled_q.double() @ pooled_k.double().mT), 0.0).sum(-1)


PARTS = {"dense": dense, "gather": gather, "pages": pages, "top": top, "step": step, "small": small, "sums": sums,
         "choose": choose}  # fmt: skip


def show(row: Row) -> None:
    """One line."""
    if row.microseconds is None:
        print(f"{row.row:34} {row.by:44} {row.note} (error {row.error}, allowed {row.allowed})", flush=True)
        return
    spread = f"({row.spread[0]:.1f} - {row.spread[1]:.1f})" if row.spread else ""
    rb = "" if row.rb is None else f"rb {row.rb:.2f}"
    clean = f"clean {row.clean:.1f}" + ("" if row.rb_clean is None else f" rb {row.rb_clean:.2f}")
    print(f"{row.row:34} {row.by:44} {row.microseconds:8.1f} us {spread:18} {rb:8} {clean:22} {row.goal}", flush=True)


def main() -> None:
    """Print the rows, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tune", nargs="*", choices=list(PARTS), default=[])
    parser.add_argument("--out")
    parser.add_argument("--once", action="store_true", help="compile and check, take no times")
    args = parser.parse_args()
    global ONCE
    ONCE = args.once
    if not torch.cuda.is_available():
        sys.exit("This measures a CUDA device, and there is none.")
    name = torch.cuda.get_device_name()
    here = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    print(here | {"copy TB/s": round(copy_bandwidth() / 1e12, 3)})
    rows = []
    for part in args.only:
        tuned = argparse.Namespace(tune=part in args.tune)
        for row in PARTS[part](tuned):
            show(row)
            rows.append(row)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({**here, "copy": copy_bandwidth(), "rows": [asdict(r) for r in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
