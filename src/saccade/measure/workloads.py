"""What each op is timed on: random tensors of a shape, and the dense attention that the op is there to spare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade import ops
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.selection import Blocks

BLOCK, PAGE, LAST = 128, 16, 64  # tokens of a block and of a page; queries that are asked for an estimate
GATED = 64  # tokens of a block that a gate chooses


@dataclass(frozen=True)
class Shape:
    """Of one layer's attention."""

    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_size: int
    density: float
    dtype: torch.dtype
    device: torch.device

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [b heads tokens size] of standard normals."""
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        sizes = {name: (self.batch, h, self.tokens, self.head_size) for name, h in heads.items()}
        drawn = [torch.randn(size, generator=rng.generator("workload", name)) for name, size in sizes.items()]
        q, k, v = (x.to(self.device, self.dtype) for x in drawn)
        return q, k, v


@dataclass(frozen=True)
class Work:
    """call: the op, with `impl` and `report`. dense: PyTorch's attention of the same queries over all keys.

    bytes: that a call has to read and write at least once; dense_bytes: those of `dense`.
    """

    call: Callable[..., Any]
    dense: Callable[[], Tensor]
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Workload:
    """An op, in words, and how to make its work of a shape and its q, k and v."""

    op: str
    what: str
    stage: str
    make: Callable[[Shape, Tensor, Tensor, Tensor], Work]

    def work(self, shape: Shape, exact: bool = False) -> Work:
        """Of tensors that depend on the shape alone; `exact`: the same numbers in float64."""
        q, k, v = shape.draw()
        return self.make(shape, *((q.double(), k.double(), v.double()) if exact else (q, k, v)))


WORKLOADS: dict[str, Workload] = {}


def workload(stage: str, what: str) -> Callable[[Callable[..., Work]], Callable[..., Work]]:
    """Register how to make the work of the op that the function is named for."""

    def register(make: Callable[..., Work]) -> Callable[..., Work]:
        name = make.__name__.strip("_").replace("_", "-")
        WORKLOADS[name] = Workload(name, what, stage, make)
        return make

    return register


def _beside_dense(call: Callable[..., Any], read: int, q: Tensor, k: Tensor, v: Tensor) -> Work:
    """Beside attention of all queries, or of the last one, which sees every key."""
    every = q.shape[2] == k.shape[2]

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=every, enable_gqa=True)

    return Work(call, dense, read, 2 * q.nbytes + k.nbytes + v.nbytes)


@workload("prefill", "attention over random blocks of 128 x 128, the same for the query heads of a key/value head")
def _attend(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    chosen = _blocks(shape)
    index = chosen.crow.nbytes + chosen.col.nbytes
    read = 2 * q.nbytes + k.nbytes + v.nbytes + index
    return _beside_dense(lambda **how: ops.attend(q, k, v, chosen, **how), read, q, k, v)


@workload("prefill", "choosing those blocks by mean-pooled queries and keys")
def _pool_and_select(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    keep = max(1, round(shape.density * shape.tokens / BLOCK / 2))

    def call(**how: Any) -> Any:
        return ops.pool_and_select(q, k, keep_blocks=keep, q_block=BLOCK, k_block=BLOCK, **how)

    return _beside_dense(call, q.nbytes + k.nbytes, q, k, v)


@workload("prefill", "choosing blocks of 64 by a learnt gate: pool, project, score, take the best")
def _block_gate(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    draw, size = rng.generator("workload", "gate"), shape.head_size
    gate = ops.Gate(torch.randn(shape.heads, 3 * size, size, generator=draw).to(shape.device, torch.float32))
    row = Budget(shape.density).row_tokens(shape.tokens)
    options = {"queries": shape.tokens, "keys": shape.tokens, "block": GATED}

    def call(**how: Any) -> Any:
        score = ops.block_gate(q, k, gate, _rotary, block=GATED, **how)
        return ops.choose_blocks(score, row_tokens=max(row, GATED), whole_last=2, **options)

    return _beside_dense(call, q.nbytes + k.nbytes + gate.keys.nbytes, q, k, v)


@workload("prefill", "attention that the last 64 queries pay to each key")
def _column_scores(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    last = q[:, :, -LAST:]
    read = last.nbytes + k.nbytes + shape.batch * shape.heads * shape.tokens * 4
    return _beside_dense(lambda **how: ops.column_scores(last, k, **how), read, q, k, v)


@workload("prefill", "the same, over diagonals too")
def _line_scores(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    last = q[:, :, -LAST:]
    read = last.nbytes + k.nbytes + 2 * shape.batch * shape.heads * shape.tokens * 4
    return _beside_dense(lambda **how: ops.line_scores(last, k, **how), read, q, k, v)


@workload("prefill", "least and largest value of every channel over pages of 16 keys")
def _page_bounds(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    return _beside_dense(lambda **how: ops.page_bounds(k, PAGE, **how), k.nbytes + 2 * k.nbytes // PAGE, q, k, v)


@workload("decode", "one query over random keys, the same for the query heads of a key/value head")
def _decode(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    one, kept = q[:, :, -1:], max(1, round(shape.density * shape.tokens))
    order = torch.rand(shape.batch, shape.kv_heads, 1, shape.tokens, generator=rng.generator("workload", "keys"))
    index = order.topk(kept, -1).indices.sort(-1).values.int().to(shape.device)
    read = 2 * one.nbytes + (k.nbytes + v.nbytes) * kept // shape.tokens + index.nbytes
    return _beside_dense(lambda **how: ops.decode(one, k, v, index, **how), read, one, k, v)


@workload("decode", "how large one query's logits with pages of 16 keys can be")
def _page_scores(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    one, (low, high) = q[:, :, -1:], ops.page_bounds(k, PAGE)
    read = one.nbytes + low.nbytes + high.nbytes + shape.batch * shape.heads * low.shape[2] * 4
    return _beside_dense(lambda **how: ops.page_scores(one, low, high, **how), read, one, k, v)


@workload("decode", "the best of those pages, for each key/value head")
def _topk(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    one, pages = q[:, :, -1:], max(1, round(shape.density * shape.tokens / PAGE))
    scores = ops.page_scores(one, *ops.page_bounds(k, PAGE), by_group=True)
    read = scores.nbytes + scores.numel() // scores.shape[-1] * pages * 4
    return _beside_dense(lambda **how: ops.topk(scores, pages, **how), read, one, k, v)


@workload("decode", "one query: score pages of 16 keys, choose the best, attend to their keys")
def _sparse_step(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Work:
    one, pages = q[:, :, -1:], max(1, round(shape.density * shape.tokens / PAGE))
    low, high = ops.page_bounds(k, PAGE)

    def call(**how: Any) -> Any:
        return ops.sparse_step(one, k, v, low, high, page_tokens=PAGE, keep_pages=pages, **how)

    kept = (k.nbytes + v.nbytes) * min(1.0, pages * PAGE / shape.tokens)
    return _beside_dense(call, 2 * one.nbytes + low.nbytes + high.nbytes + int(kept), one, k, v)


def _rotary(x: Tensor, shifts: Tensor) -> Tensor:
    """As most models rotate queries and keys."""
    speed = 10_000.0 ** -torch.arange(0, 1, 2 / x.shape[-1], device=x.device)
    angle = shifts[:, None] * torch.cat([speed, speed])
    a, b = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat([-b, a], -1) * angle.sin().to(x.dtype)


def _blocks(shape: Shape) -> Blocks:
    sizes = (shape.tokens, shape.density, BLOCK, shape.heads, shape.kv_heads)
    return random_blocks(*sizes, rng.generator("workload", "blocks"), shape.batch, shape.device)


def random_blocks(
    tokens: int,
    density: float,
    block: int,
    heads: int,
    drawn: int,
    draw: torch.Generator,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Blocks:
    """Of the causal blocks the share `density`, those on the diagonal first; heads / drawn in a row have the same."""
    n = -(-tokens // block)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    score = torch.rand(batch, drawn, n, n, generator=draw)
    score.diagonal(dim1=-2, dim2=-1).fill_(2)
    flat = score.masked_fill_(~causal, -1).flatten(2)
    best = flat.topk(max(n, round(density * int(causal.sum()))), -1).indices
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True).view_as(score)
    keep = keep.repeat_interleave(heads // drawn, 1).to(device)
    return Blocks.of(keep, queries=tokens, keys=tokens, q_block=block, k_block=block)
