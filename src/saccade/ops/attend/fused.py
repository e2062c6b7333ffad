"""What PyTorch's own attention kernel for CPUs can do of a selection: it keeps the logits in the cache, and gives lse.

It knows a causal square and a mask that is added. A sliding window is cut so that hardly anything needs the mask: for a
tile of R rows most of the window is seen by every row, and those keys are views into K, one overlapping the next; only
the two ends, where a row sees what the row before it does not, are copied and masked, by one mask for all tiles.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from saccade.core.selection import Selection, Spans
from saccade.ops.attend.tiles import Share
from saccade.ops.merge_lse.api import merge_lse

FEW_PAIRS = 1 << 17  # of one head: below, making tiles costs more than they save
TILE_ROWS = (256, 128, 64)  # of a band: the largest that the window is four times as long as, else the smallest


def can(q: Tensor, softcap: float | None) -> bool:
    """Whether the kernel computes such heads at all; queries, keys and values must be of one size."""
    return q.device.type == "cpu" and softcap is None


def few(queries: int, keys: int) -> bool:
    """Whether a mask over all pairs costs less than tiles would."""
    return 0 < queries * keys <= FEW_PAIRS


def kernel(
    q: Float[Tensor, "b h q d"], k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """Attention, causal from the first key or under a mask that is added; the last axis of all has stride 1."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def whole(q: Tensor, k: Tensor, v: Tensor, share: Share, scale: float, out: Tensor, lse: Tensor) -> bool:
    """Compute all rows of some heads, dense or sinks and window; False where that cannot be."""
    return _dense(q, k, v, share, scale, out, lse) or _band(q, k, v, share, scale, out, lse)


def _dense(q: Tensor, k: Tensor, v: Tensor, share: Share, scale: float, out: Tensor, lse: Tensor) -> bool:
    """Heads that see everything."""
    square = q.shape[2] == k.shape[2] or not share.selection.causal  # its causality counts from the first key
    if not square or not share.dense or not q.shape[2]:
        return False
    b, g, heads = share.batch, share.kv_head, list(share.members)
    keys, values = (x[b : b + 1, g : g + 1].expand(-1, len(heads), -1, -1) for x in (k, v))
    o, e = kernel(q[b : b + 1, heads], keys, values, None, share.selection.causal, scale)
    out[b, heads], lse[b, heads] = o[0], e[0].to(lse.dtype)
    return True


def together(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, out: Tensor, lse: Tensor) -> bool:
    """Compute all heads in one call: a causal square, or few pairs under a mask; False where it is neither."""
    seen = _seen(selection, q.shape[2], k.shape[2])
    if seen is False:
        return False
    added = None if seen is None else _added(seen, q, k.shape[1])
    o, e = kernel(*_grouped(*_of_one_size(q, k, v)), added, seen is None, scale)
    o, e = (x.unflatten(0, (-1, k.shape[1])).flatten(1, 2) for x in (o, e))
    out.copy_(o[..., : v.shape[-1]])
    lse.copy_(e if seen is None else e.masked_fill(~seen.any(-1), -torch.inf))  # the kernel says 0
    return True


def together_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, selection: Selection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output, of what `together` computed."""
    g, sizes, seen = k.shape[1], [x.shape[-1] for x in (q, k, v)], _seen(selection, q.shape[2], k.shape[2])
    q, k, v, out, d_out = _of_one_size(q, k, v, out, d_out)
    rows = (x.unflatten(1, (g, -1)).flatten(0, 1) for x in (d_out, out, lse.masked_fill(lse == -torch.inf, 0.0)))
    grad, own, base = (x.contiguous() for x in rows)
    added = None if seen is None else _added(seen, q, g)
    every = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *_grouped(q, k, v), own, base, 0.0, seen is None, attn_mask=added, scale=scale
    )
    d_q, *others = (x.unflatten(0, (-1, g))[..., :size] for x, size in zip(every, sizes))
    return d_q.flatten(1, 2), *(x.sum(2) for x in others)


def _of_one_size(*tensors: Tensor) -> list[Tensor]:
    """The smaller ones with zeros behind, which change no product."""
    size = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1])) for x in tensors]


def _seen(selection: Selection, n: int, keys: int) -> Bool[Tensor, "b h q k"] | Literal[False] | None:
    """What each row sees where that is small; None: a causal square; False: neither."""
    if isinstance(selection, Spans) and selection.causal and bool((selection.window >= keys).all()):
        return None if n == keys > 0 and selection.dilation == 1 and not selection.grid else False
    return selection.mask() if few(n, keys) else False


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """[b g, heads of the group, tokens, size]."""
    many = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (-1, many)).flatten(0, 1)
    return grouped, *(x.flatten(0, 1)[:, None].expand(-1, many, -1, -1) for x in (k, v))


def _added(seen: Bool[Tensor, "b h q k"], q: Tensor, groups: int) -> Float[Tensor, "b*g s q k"]:
    """What is added to the logits."""
    added = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    return added.expand(*q.shape[:2], -1, -1).unflatten(1, (groups, -1)).flatten(0, 1)


def _band(q: Tensor, k: Tensor, v: Tensor, share: Share, scale: float, out: Tensor, lse: Tensor) -> bool:
    """Heads of sinks and a window, in a prompt from its first key on."""
    s = share.selection
    if type(s) is not Spans or not s.causal or s.dilation > 1 or s.grid or s.queries != s.keys:
        return False
    sinks, window = (int(x[share.row[1] if len(x) > 1 else 0]) for x in (s.sinks, s.window))
    early = sinks + window  # rows that see every key before them
    if window < TILE_ROWS[-1] or s.keys <= early:
        return False
    b, heads = share.batch, list(share.members)
    keys, values = k[b, share.kv_head], v[b, share.kv_head]
    for first, rows, many in [(0, early, 1), *_tiles(early, s.queries, window)]:
        mine = q[b, heads, first : first + rows * many].unflatten(1, (many, rows)).transpose(0, 1)
        if first:
            o, e = _banded(mine, keys, values, first, sinks, window, scale)
        else:
            every = (x[None, None, :early].expand(-1, len(heads), -1, -1) for x in (keys, values))
            o, e = kernel(mine, *every, None, True, scale)
        out[b, heads, first : first + rows * many] = o.transpose(0, 1).flatten(1, 2)
        lse[b, heads, first : first + rows * many] = e.transpose(0, 1).flatten(1, 2).to(lse.dtype)
    return True


def _tiles(first: int, last: int, window: int) -> list[tuple[int, int, int]]:
    """(first row, rows of a tile, tiles) for the rows [first, last): equal tiles, and what is left over."""
    rows = next((r for r in TILE_ROWS if window >= 4 * r), TILE_ROWS[-1])
    many, rest = divmod(last - first, rows)
    return [t for t in ((first, rows, many), (last - rest, rest, 1)) if t[1] * t[2]]


def _banded(
    q: Float[Tensor, "t h r d"], k: Float[Tensor, "k d"], v: Float[Tensor, "k d"], first: int, sinks: int, window: int,
    scale: float,
) -> tuple[Float[Tensor, "t h r d"], Float[Tensor, "t h r"]]:  # fmt: skip
    """Tiles of rows, the first of which is row `first`: what all rows of a tile see, and the ends of their windows."""
    t, h, r, _ = q.shape

    def at(x: Tensor, start: int, size: int) -> Tensor:
        """The keys [start, start + size) of each tile, `r` further for the next."""
        return x[start:].as_strided((t, size, x.shape[1]), (r * x.stride(0), x.stride(0), 1))

    def by_head(x: Float[Tensor, "t n d"]) -> Float[Tensor, "t h n d"]:
        return x[:, None].expand(-1, h, -1, -1)

    shared = [by_head(at(x, first + r - window, window - r + 1)) for x in (k, v)]
    ends = [
        by_head(torch.cat([x[:sinks].expand(t, -1, -1), at(x, first - window + 1, r - 1), at(x, first + 1, r - 1)], 1))
        for x in (k, v)
    ]
    inner = kernel(q, *shared, None, False, scale)
    if not ends[0].shape[2]:
        return inner
    added = torch.zeros(r, ends[0].shape[2], dtype=q.dtype).masked_fill_(_ends(r, sinks), -torch.inf)
    return merge_lse(*zip(inner, kernel(q, *ends, added.expand(t, h, -1, -1), False, scale)))


@functools.lru_cache(maxsize=16)
def _ends(rows: int, sinks: int) -> Bool[Tensor, "r n"]:
    """What row i does not see of the sinks, the first rows - 1 keys of the tile's windows, and the last as many."""
    row, place = torch.arange(rows)[:, None], torch.arange(rows - 1)
    none = torch.zeros(rows, sinks, dtype=torch.bool)
    return torch.cat([none, place < row, place >= row], 1)
