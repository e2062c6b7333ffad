"""How near `ops.attend` over a neighbourhood on a grid comes to dense attention on a CUDA device, per pair computed.

    PYTHONPATH=src python benchmarks/gpu_grid.py --json found.json
    PYTHONPATH=src python benchmarks/gpu_grid.py --tune             # steps and warps of the kernels

The case that NATTEN publishes: a grid of 256 x 256 tokens, windows of 80 x 80 shifted inwards at the border, 24 heads
of 128, bfloat16. share = TFLOP/s over the pairs of the windows (4 D flop each, 2.5 times that backward), over 680, that
of FlashAttention-3; cuDNN's dense attention over half the tokens is in the same run. The whole call is timed.
Nothing is brought into another order. FlexAttention gets tokens in the order of its blocks (8 x 16 cells) and its mask
made before.

Each number comes after a check of sampled rows against float64 (backward: of one head), and is not printed if that
fails. Median of the rounds, least and largest; the second-level cache is cleared before each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from gpu import GRID_GOALS, GRID_REFERENCE
from gpu_attend import WRONG, Run, milliseconds, relative, speed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from saccade import ops
from saccade.core import rng
from saccade.core.selection import Spans
from saccade.measure.environment import environment
from saccade.ops.attend import flex
from saccade.ops.attend.triton import grid as boxes

SIDE, WINDOW, HEADS, SIZE = 256, 80, 24, 128
TOKENS = SIDE * SIDE
PAIRS = float(HEADS * TOKENS * WINDOW * WINDOW)
CELLS = (8, 16)  # of FlexAttention's blocks


def selection() -> Spans:
    """The windows."""
    one = torch.ones(1, dtype=torch.long)
    sides = {"grid": (SIDE, SIDE), "kernel": (WINDOW, WINDOW)}
    return Spans(sinks=one, window=one, queries=TOKENS, keys=TOKENS, causal=False, **sides)


def inputs(grad: bool = False) -> list[Tensor]:
    """q, k, v of standard normals."""
    draw = rng.generator("benchmarks/gpu_grid", device="cuda")
    made = [torch.randn(1, HEADS, TOKENS, SIZE, generator=draw, device="cuda").bfloat16() for _ in range(3)]
    return [x.requires_grad_(grad) for x in made]


# --- right? ---------------------------------------------------------------------------------------------------------


def window_of(token: int) -> tuple[int, int]:
    """First cell of a token's window."""
    y, x = (min(max(c - WINDOW // 2, 0), SIDE - WINDOW) for c in divmod(token, SIDE))
    return y, x


def seen_by(token: int) -> Tensor:
    """The keys that a token sees."""
    y, x = window_of(token)
    at = torch.arange(WINDOW, device="cuda")
    return ((y + at)[:, None] * SIDE + x + at).flatten()


def wrong(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative error of sampled rows: corners, borders, inside."""
    found, exact = [], []
    for head, row in ((0, 0), (HEADS - 1, TOKENS - 1), (5, 255), (7, 40 * SIDE + 39), (11, 128 * SIDE + 131),
                      (HEADS - 1, 216 * SIDE + 217), (3, 100 * SIDE + 7)):
        keys = seen_by(row)
        logits = k[0, head, keys].double() @ q[0, head, row].double() * SIZE**-0.5
        exact.append(logits.softmax(0) @ v[0, head, keys].double())
        found.append(out[0, head, row].double())
    return relative(torch.stack(found), torch.stack(exact))


def wrong_gradients(grads: list[Tensor], q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> float:
    """Largest relative error of the gradients of the last head, by float64, line of queries by line; of dq some."""
    qf, kf, vf, df = (x[0, -1].detach() for x in (q, k, v, d_out))
    dk, dv = (torch.zeros(TOKENS, SIZE, dtype=torch.float64, device="cuda") for _ in range(2))
    columns = torch.arange(SIDE, device="cuda")
    first = (columns - WINDOW // 2).clamp(0, SIDE - WINDOW)
    near = (columns[None] >= first[:, None]) & (columns[None] < first[:, None] + WINDOW)  # [query, key] along a line
    lines, off = (0, 3, 100, SIDE - 1), 0.0
    for y in range(SIDE):
        top = min(max(y - WINDOW // 2, 0), SIDE - WINDOW)
        rows, keys = slice(y * SIDE, (y + 1) * SIDE), slice(top * SIDE, (top + WINDOW) * SIDE)
        s = (qf[rows].double() @ kf[keys].double().T * SIZE**-0.5).masked_fill(~near.repeat(1, WINDOW), -torch.inf)
        p = s.softmax(-1)
        dp = df[rows].double() @ vf[keys].double().T
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * SIZE**-0.5
        if y in lines:
            off = max(off, relative(grads[0][0, -1, rows], ds @ kf[keys].double()))
        dk[keys] += ds.T @ qf[rows].double()
        dv[keys] += p.T @ df[rows].double()
    return max(off, relative(grads[1][0, -1], dk), relative(grads[2][0, -1], dv))


# --- peers ----------------------------------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every pair, by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def reordered(x: Tensor) -> Tensor:
    """Tokens in the order of FlexAttention's blocks."""
    y, w = CELLS
    return x.unflatten(2, (SIDE // y, y, SIDE // w, w)).transpose(3, 4).flatten(2, 5).contiguous()


def restored(x: Tensor) -> Tensor:
    """Back."""
    y, w = CELLS
    return x.unflatten(2, (SIDE // y, SIDE // w, y, w)).transpose(3, 4).flatten(2, 5)


def flex_mask() -> BlockMask:
    """Of blocks of CELLS, by their windows; the cells say the rest."""
    (height, width), across = CELLS, SIDE // CELLS[1]

    def axis(cells: int) -> tuple[Tensor, Tensor]:
        start = torch.arange(0, SIDE, cells, device="cuda")
        low, high = ((x - WINDOW // 2).clamp(0, SIDE - WINDOW)[:, None] for x in (start, start + cells - 1))
        some = (start < high + WINDOW) & (start + cells > low)
        return some, (start >= high) & (start + cells <= low + WINDOW)

    def both(y: Tensor, x: Tensor) -> Tensor:
        return (y[:, None, :, None] & x[None, :, None, :]).flatten(2, 3).flatten(0, 1)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        def cell(i: Tensor) -> tuple[Tensor, Tensor]:
            block, place = i // 128, i % 128
            return block // across * height + place // width, block % across * width + place % width

        (qy, qx), (ky, kx) = cell(q), cell(k)
        top, left = (torch.clamp(c - WINDOW // 2, 0, SIDE - WINDOW) for c in (qy, qx))
        return (ky >= top) & (ky < top + WINDOW) & (kx >= left) & (kx < left + WINDOW)

    (some_y, all_y), (some_x, all_x) = axis(height), axis(width)
    some, whole = both(some_y, some_x)[None, None], both(all_y, all_x)[None, None]
    return flex._mask(selection(), some, whole, rule, (128, 128))


# --- how fast? ------------------------------------------------------------------------------------------------------


def told(name: str, found: dict[str, Any], goal: float | None = None) -> str:
    """For people."""
    text = f"{name:34} {found['ms']:8.3f} ms {found['tflops']:4.0f} ({found['least']:.0f} - {found['largest']:.0f})"
    text += f"  share {found['tflops'] / GRID_REFERENCE:.3f}"
    return text if goal is None else text + f"  goal {goal:.2f}"


def timed(work, off: float, rounds: int, backward: bool = False, pairs: float = PAIRS) -> dict[str, Any]:
    """A row, or that it is wrong."""
    if not off <= WRONG:
        return {"wrong": off}
    return speed(pairs, milliseconds(work, rounds), backward) | {"relative_error": off}


def forward_rows(rounds: int) -> dict[str, dict[str, Any]]:
    """Of ours, its parts, and the peers."""
    q, k, v = inputs()
    where, found = selection(), {}
    half = q[:, :, : TOKENS // 2], k[:, :, : TOKENS // 2], v[:, :, : TOKENS // 2]
    found["dense half the tokens by cuDNN"] = timed(
        lambda: dense(*half), 0.0, rounds, pairs=float(HEADS * (TOKENS // 2) ** 2)
    )
    call = lambda: ops.attend(q, k, v, where, impl="triton")[0]  # noqa: E731
    found["triton"] = timed(call, wrong(call(), q, k, v), rounds)
    mask, (a, b, c) = flex_mask(), map(reordered, (q, k, v))
    by_flex = lambda: flex._compiled()(a, b, c, block_mask=mask)  # noqa: E731
    found["flex, order apart"] = timed(by_flex, wrong(restored(by_flex()), q, k, v), rounds)
    return found


def backward_rows(rounds: int) -> dict[str, dict[str, Any]]:
    """Of ours."""
    q, k, v = inputs(grad=True)
    out = ops.attend(q, k, v, selection(), impl="triton")[0]
    draw = rng.generator("d_out", device="cuda")
    d_out = torch.randn(out.shape, generator=draw, device="cuda", dtype=torch.float32).to(out.dtype)
    back = lambda: list(torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))  # noqa: E731
    return {"triton backward": timed(back, wrong_gradients(back(), q, k, v, d_out), rounds, backward=True)}


def tried(works: dict[str, tuple[Run, Callable[[], float]]], rounds: int, backward: bool) -> dict[str, dict[str, Any]]:
    """Each with its error, a line each; none stops the others."""
    found: dict[str, dict[str, Any]] = {}
    for name, (work, off) in works.items():
        try:
            work()
            found[name] = timed(work, off(), rounds, backward)
            print(told(name, found[name]) if "ms" in found[name] else f"{name} WRONG {found[name]}", flush=True)
        except Exception:
            found[name] = {"failed": traceback.format_exc(limit=-3)}
            print(f"{name}: failed: {found[name]['failed'].strip().splitlines()[-1][:160]}", flush=True)
    return found


def tune(rounds: int) -> dict[str, dict[str, Any]]:
    """Shapes of the kernels."""
    from saccade.ops.attend.triton.grid import launch
    from saccade.ops.attend.triton.launch import Shape

    q, k, v = inputs()
    grid, scale = boxes.of(selection()), SIZE**-0.5
    out, lse, _ = launch.forward(q, k, v, grid, scale, None)
    d_out = torch.randn(out.shape, generator=rng.generator("d_out", device="cuda"), device="cuda").bfloat16()
    delta, base = launch.row_sums(out, d_out, lse, torch.zeros_like(lse))
    grads = [torch.empty_like(x) for x in (q, k, v)]
    works: dict[str, tuple[Run, Callable[[], float]]] = {}

    def right() -> float:
        off = wrong(out, q, k, v)
        out.fill_(math.nan)  # for the next
        return off

    for shape in (Shape(64, 8, 2), Shape(64, 8, 3), Shape(128, 8, 2), Shape(64, 4, 2), Shape(32, 4, 3)):
        works[f"forward {told_shape(shape)}"] = (
            lambda shape=shape: launch.over_keys(q, k, v, None, out, lse, None, None, grid, scale, None, shape), right
        )
    found = tried(works, rounds, backward=False)
    launch.over_keys(q, k, v, d_out, grads[0], base, None, delta, grid, scale, None)
    launch.over_queries(q, k, v, d_out, base, None, delta, *grads[1:], grid, scale, None)
    gradients, works = (lambda: wrong_gradients(grads, q, k, v, d_out)), {}
    for shape in (Shape(64, 8, 2), Shape(64, 8, 3), Shape(64, 4, 2), Shape(32, 4, 2), Shape(32, 8, 2)):
        works[f"dq {told_shape(shape)}"] = lambda shape=shape: launch.over_keys(
            q, k, v, d_out, grads[0], base, None, delta, grid, scale, None, shape), gradients
    for shape in (Shape(64, 4, 2), Shape(64, 8, 2), Shape(64, 8, 3), Shape(32, 4, 2), Shape(128, 8, 2)):
        works[f"dk dv {told_shape(shape)}"] = lambda shape=shape: launch.over_queries(
            q, k, v, d_out, base, None, delta, *grads[1:], grid, scale, None, shape), gradients
    return found | tried(works, rounds, backward=True)


def told_shape(shape: Any) -> str:
    """For people."""
    return f"step {shape.step} warps {shape.warps} stages {shape.stages}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tune", action="store_true", help="steps and warps of the kernels")
    parser.add_argument("--json", help="write the rows there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none.", file=sys.stderr)
        return 3
    rows: dict[str, dict[str, Any]] = {}
    bad = 0
    for part in [tune] if args.tune else [torch.no_grad()(forward_rows), backward_rows]:
        try:
            mine = part(args.rounds)
            rows |= mine
            if not args.tune:
                for name, row in mine.items():
                    print(told(name, row, GRID_GOALS.get(name)) if "tflops" in row else f"{name:34} {row}", flush=True)
        except Exception:
            bad += 1
            print(traceback.format_exc(limit=-4), flush=True)
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            what = {"rounds": args.rounds, "pairs": PAIRS, "environment": environment("cuda")}
            json.dump(what | {"rows": rows}, file, indent=1)
    return int(bad > 0 or any("wrong" in row or "failed" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
