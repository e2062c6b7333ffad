"""Parts merged by one kernel each way: every part is read once, and only where its rows saw something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 32  # of a program


@triton.jit
def _merged(OUTS, LSES, OUT, LSE, rows, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """out = sum_i exp(lse_i - lse) out_i; OUTS and LSES are tuples."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    alive = row < rows
    top = tl.full([BM], -float("inf"), tl.float32)
    for i in tl.static_range(len(LSES)):
        top = tl.maximum(top, tl.load(LSES[i] + row, mask=alive, other=-float("inf")))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for i in tl.static_range(len(LSES)):
        lse = tl.load(LSES[i] + row, mask=alive, other=-float("inf"))
        weight = tl.exp(lse - base)
        some = alive & (lse != -float("inf"))
        at = OUTS[i] + row[:, None] * D + d[None, :]
        acc += weight[:, None] * tl.load(at, mask=some[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += weight
    safe = tl.where(total == 0, 1.0, total)
    acc = acc / safe[:, None]
    tl.store(
        OUT + row[:, None] * D + d[None, :], acc.to(OUT.dtype.element_ty), mask=alive[:, None] & (d < D)[None, :]
    )
    tl.store(LSE + row, tl.where(total == 0, -float("inf"), base + tl.log(safe)), mask=alive)


@triton.jit
def _parted(OUTS, LSES, DO, DLSE, DOUTS, DLSES, rows, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """dO_i = w_i dO,  dlse_i = w_i (dlse + dO (O_i - O)),  w_i = exp(lse_i - lse);  dO O = sum_i w_i dO O_i."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    alive = row < rows
    place = row[:, None] * D + d[None, :]
    mask = alive[:, None] & (d < D)[None, :]
    do = tl.load(DO + place, mask=mask, other=0.0).to(tl.float32)
    dlse = tl.load(DLSE + row, mask=alive, other=0.0)
    top = tl.full([BM], -float("inf"), tl.float32)
    for i in tl.static_range(len(LSES)):
        top = tl.maximum(top, tl.load(LSES[i] + row, mask=alive, other=-float("inf")))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BM], tl.float32)
    whole = tl.zeros([BM], tl.float32)
    for i in tl.static_range(len(LSES)):
        lse = tl.load(LSES[i] + row, mask=alive, other=-float("inf"))
        part = tl.load(OUTS[i] + place, mask=mask & (lse != -float("inf"))[:, None], other=0.0).to(tl.float32)
        weight = tl.exp(lse - base)
        total += weight
        whole += weight * tl.sum(do * part, 1)
    total = tl.where(total == 0, 1.0, total)
    whole = whole / total
    for i in tl.static_range(len(LSES)):
        lse = tl.load(LSES[i] + row, mask=alive, other=-float("inf"))
        part = tl.load(OUTS[i] + place, mask=mask & (lse != -float("inf"))[:, None], other=0.0).to(tl.float32)
        weight = tl.exp(lse - base) / total
        tl.store(DOUTS[i] + place, (weight[:, None] * do).to(DOUTS[i].dtype.element_ty), mask=mask)
        tl.store(DLSES[i] + row, weight * (dlse + tl.sum(do * part, 1) - whole), mask=alive)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, many: int, *parts: Tensor):
        outs, lses = parts[:many], parts[many:]
        out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
        _launch(_merged, outs[0], tuple(outs), tuple(lses), out, lse)
        ctx.save_for_backward(*parts)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor):  # type: ignore[override]
        parts = ctx.saved_tensors
        outs, lses = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        d_outs, d_lses = (tuple(torch.empty_like(x) for x in some) for some in (outs, lses))
        _launch(_parted, d_out, outs, lses, d_out.contiguous(), d_lse.contiguous(), d_outs, d_lses)
        return None, *d_outs, *d_lses


def _launch(kernel: Any, like: Float[Tensor, "b h q d"], *arguments: Any) -> None:
    d, rows = like.shape[-1], like.shape[:-1].numel()
    if rows and d:
        kernel[(triton.cdiv(rows, ROWS),)](*arguments, rows, D=d, BD=triton.next_power_of_2(d), BM=ROWS)


def merge_lse(
    outs: Sequence[Float[Tensor, "b h q d"]], lses: Sequence[Float[Tensor, "b h q"]]
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """As the op says it; outputs of one dtype, lse in float32."""
    return _Merge.apply(len(outs), *[x.contiguous() for x in (*outs, *lses)])  # type: ignore[return-value]
