"""Selections of every kind, and tensors for them, drawn by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from saccade.core import rng
from saccade.core.selection import Blocks, Buckets, Gather, Lines, Pairs, PerHead, Selection, Spans, dense

KINDS = ("blocks", "gather", "spans", "lines", "buckets", "others", "pairs", "perhead", "grid")
FREE = ("dense", "blocks", "gather", "spans", "buckets", "others", "pairs")  # queries that lie before all keys, too
HEAD_SIZES = (32, 64, 80, 96, 128, 256)


def tensors(b: int, h: int, g: int, queries: int, keys: int, d: int, dtype=torch.float32, seed: int = 0):
    """q, k, v of standard normals."""
    shapes = (b, h, queries, d), (b, g, keys, d), (b, g, keys, d)
    return [
        torch.randn(s, generator=rng.generator(f"ops-{i}", seed, *s)).to(dtype) for i, s in enumerate(shapes)
    ]


def drawn(shape, low: int, high: int, seed: int) -> Tensor:
    """Whole numbers in [low, high)."""
    return torch.randint(low, max(high, low + 1), shape, generator=rng.generator("drawn", seed, *shape))


def free(kind: str, queries: int = 90, keys: int = 30) -> Selection:
    """One of `FREE`, not causal, with more queries than keys."""
    if kind == "dense":
        return dense(queries, keys, causal=False)
    return build(kind, 1, 1, queries, keys, False, 2, 16)


def build(kind: str, b: int, h: int, queries: int, keys: int, causal: bool, seed: int, block: int) -> Selection:
    """A random selection of a kind; rows that see nothing occur."""
    shape = {"queries": queries, "keys": keys, "causal": causal}
    nqb, nkb = -(-queries // block), -(-keys // (block // 2 or 1))
    if kind == "blocks":
        keep = drawn((b, h, nqb, nkb), 0, 3, seed) == 0
        return Blocks.of(keep, **shape, q_block=block, k_block=block // 2 or 1)
    if kind == "gather":
        index = torch.argsort(torch.rand(b, h, nqb, keys, generator=rng.generator("index", seed)), -1)
        index = index[..., : max(1, keys // 3)]
        # ranges over the first keys, lists over the others: disjoint, as the contract says
        middle = keys // 2
        ranges = torch.stack([drawn((b, h, nqb, 1), 0, middle, seed), drawn((b, h, nqb, 1), 0, middle + 1, seed)], -1)
        return Gather(index=torch.where(index >= middle, index, -1).int(), ranges=ranges.int(), q_block=block, **shape)
    if kind == "spans":
        dilation = 1 + seed % 2
        sinks, window = drawn((h,), 0, 5, seed), drawn((h,), 0, keys + 2, seed + 1)
        return Spans(sinks=sinks, window=window, dilation=dilation, **shape)
    if kind == "lines":
        slashes = torch.cat([torch.zeros(b, h, 1), drawn((b, h, 3), -1, keys, seed).float()], -1).int()
        # a column is listed once: -1 in place of the second
        columns = drawn((b, h, 4), -1, keys, seed).sort(-1).values
        again = torch.nn.functional.pad(columns[..., 1:] == columns[..., :-1], (1, 0))
        verticals = columns.masked_fill(again, -1).int()
        return Lines(verticals=verticals, slashes=slashes, block=block, **shape | {"causal": True})
    if kind == "buckets":
        return Buckets(q_bucket=drawn((b, h, queries), -1, 3, seed), k_bucket=drawn((b, h, keys), 0, 3, seed), **shape)
    if kind == "others":
        several = {"q_bucket": drawn((b, h, queries), -1, 7, seed), "k_bucket": drawn((b, h, keys), -1, 7, seed)}
        return Buckets(**several, family=1 + seed % 4, **shape | {"causal": False})
    if kind == "pairs":
        return Pairs(allowed=drawn((b, h, queries, keys), 0, 2, seed) == 0, **shape)
    if kind == "perhead":
        order = torch.argsort(torch.rand(h, generator=rng.generator("heads", seed)))
        first, rest = order[: h // 2], order[h // 2 :]
        return PerHead(
            parts=(
                (first, build("blocks", b, len(first), queries, keys, causal, seed, block)),
                (rest, build("spans", b, 1, queries, keys, causal, seed, block)),
            ),
            **shape,
        )
    assert kind == "grid"
    side = max(1, int(keys**0.5))
    wide = torch.full((1,), 1)
    return Spans(
        sinks=wide,
        window=wide,
        grid=(side, side),
        kernel=(min(3, side),) * 2,
        queries=side**2,
        keys=side**2,
        causal=causal,
    )


@st.composite
def selections(draw, most: int = 200, least: int = 1):
    """(kind, b, h, g, selection)."""
    kind = draw(st.sampled_from(KINDS))
    keys = draw(st.integers(least, most))
    queries = draw(st.one_of(st.just(keys), st.integers(least, keys)))
    g, group, b = draw(st.integers(1, 2)), draw(st.sampled_from([2, 3])), draw(st.integers(1, 2))
    rows = draw(st.sampled_from([1, b]))
    heads = g * group if kind == "perhead" else draw(st.sampled_from([1, g * group]))
    block = draw(st.sampled_from([1, 2, 16, 64, 256]))
    selection = build(kind, rows, heads, queries, keys, draw(st.booleans()), draw(st.integers(0, 99)), block)
    return b, g * group, g, selection
