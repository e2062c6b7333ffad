"""Blocks and causal spans through the optional library `flash-attn-4`, on NVIDIA GPUs from Hopper on; with gradients.

Its kernels walk two lists for each block of queries: key blocks that are computed whole, and key blocks in which a rule
(`mask_mod`) says pair by pair what counts; backward, the same for each block of keys. Both lists and a rule go with
every call, and nothing else says what is masked: without a rule the lists would be ignored by some ways into the
library. Its kernels are compiled for each kind of selection, dtype and head size, not for each length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.selection import Blocks, Selection, Spans
from saccade.ops.attend.flex import edges, listed, span_tables

BLOCK = 128  # keys of a block of its own, and queries too on Hopper
SIZES = (32, 128)  # of a head; above, its blocks have other sizes
TRAINED = (32, 64, 96, 128)  # of these the gradients were seen to be right
STEP = 8  # head sizes are multiples of it, and strides of rows: 16 bytes
DTYPES = (torch.float16, torch.bfloat16)
MAJORS = (9, 10, 11)  # of compute capabilities; what is newer has no block lists in it


class Lists(NamedTuple):
    """How many blocks of each row are computed by the rule, and which; how many whole, and which."""

    count: Int[Tensor, "b h n"]
    block: Int[Tensor, "b h n w"]
    whole_count: Int[Tensor, "b h n"]
    whole_block: Int[Tensor, "b h n v"]


def reasons(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> list[str]:
    """Why it cannot compute this; [] means that it can."""
    out, d = _machine(q), q.shape[-1]
    if q.dtype not in DTYPES:
        out.append(f"it computes in float16 and bfloat16, and the inputs are {str(q.dtype).split('.')[-1]}")
    if d % STEP or not SIZES[0] <= d <= SIZES[1]:
        out.append(f"heads of {d}; it takes multiples of {STEP} from {SIZES[0]} to {SIZES[1]}")
    elif d not in TRAINED and _training(q, k, v):
        sizes = ", ".join(map(str, TRAINED))
        out.append(f"gradients of heads of {d}: those of 80 were wrong on an H200 (4.0.0b18); it was right at {sizes}")
    if v.shape[-1] != d:
        out.append(f"values of {v.shape[-1]} beside keys of {d}; they are to be of one size")
    if not (q.numel() and k.numel()):
        out.append("there is no query or no key")
    if not scale > 0:
        out.append(f"a scale of {scale:g}; it takes positive ones")
    if torch.are_deterministic_algorithms_enabled() and _training(q, k, v):
        out.append("its gradients are added up in no fixed order, and deterministic algorithms are asked for")
    return out + _of_selection(selection, _rows(q.device))


def _training(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _machine(q: Tensor) -> list[str]:
    if q.device.type != "cuda":
        out = [f"flash-attn-4 runs on a CUDA device, and the inputs are on the {q.device.type}"]
    elif (found := torch.cuda.get_device_capability(q.device))[0] not in MAJORS or torch.version.hip:
        out = [f"compute capability {found[0]}.{found[1]}; it takes {MAJORS[0]}.0 to {MAJORS[-1]}.x of NVIDIA"]
    else:
        out = []
    if installed() is None:
        return [*out, "flash-attn-4 is not installed: pip install 'saccade[flash4]'"]
    return out or _broken()


@functools.cache
def installed() -> str | None:
    """Its version."""
    try:
        return version("flash-attn-4")
    except PackageNotFoundError:
        return None


@functools.cache
def _broken() -> list[str]:
    """Whether it, or what it needs, fails to import."""
    try:
        import_module("flash_attn.cute.interface")
    except (ImportError, AttributeError, OSError) as error:
        return [f"flash-attn-4 {installed()} does not import: {type(error).__name__}: {error}"]
    return []


def _rows(device: torch.device) -> int:
    """Queries of a block of its own: on Blackwell it takes two tiles at a time."""
    wide = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] > 9
    return 2 * BLOCK if wide else BLOCK


def _of_selection(s: Selection, rows: int) -> list[str]:
    if isinstance(s, Blocks):
        odd = [f"{s.q_block} queries; its own have {rows}"] if s.q_block % rows else []
        odd += [f"{s.k_block} keys; its own have {BLOCK}"] if s.k_block % BLOCK else []
        return [f"blocks of {what}" for what in odd]
    if not isinstance(s, Spans) or s.grid or s.dilation > 1 or not s.causal:
        return [f"it takes blocks and causal spans; the selection is of {s.kind}"]
    return []


def attend(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k d"],
    selection: Selection,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q"]]:
    """softmax over the selected pairs, and lse; differentiable in q, k, v through both."""
    with torch.cuda.device(q.device):
        options = _options(selection, q, _training(q, k, v))
        out, lse = import_module("flash_attn.cute.interface").flash_attn_func(
            *(_laid(x) for x in (q, k, v)),
            softmax_scale=scale,
            softcap=softcap or 0.0,
            pack_gqa=False,  # it would want one list for all heads
            return_lse=True,
            **options,
        )
    return out.transpose(1, 2), lse


def _options(s: Selection, q: Tensor, training: bool) -> dict[str, Any]:
    """Rule and lists, as its arguments."""
    rows = _rows(q.device)
    forward, backward, per_head = of_blocks(s, rows, q.device) if isinstance(s, Blocks) else of_spans(s, rows, q.device)
    tensors = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    options = {
        "mask_mod": _rule(s.kind if s.causal else "bounds"),
        "block_sparse_tensors": tensors(*forward, block_size=(rows, BLOCK)),
    }
    if per_head:
        options["aux_tensors"] = [x.clamp(max=s.keys).int().expand(q.shape[1]).contiguous() for x in per_head]
    if training:
        options["block_sparse_tensors_bwd"] = tensors(*backward(), block_size=(rows, BLOCK))
    return options


def _laid(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n h d"]:
    """Its layout; copied only where rows do not start at multiples of 16 bytes, or are one row many times."""
    fits = x.stride(-1) == 1 and all(s > 0 and s % STEP == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return (x if fits else x.clone(memory_format=torch.contiguous_format)).transpose(1, 2)


@functools.cache
def _rule(kind: str) -> Callable[..., Any]:
    from saccade.ops.attend import flash4_rules

    return getattr(flash4_rules, kind)


# --- the lists --------------------------------------------------------------------------------------------------------

Made = tuple[Lists, Callable[[], Lists], tuple[Tensor, ...]]


def of_blocks(s: Blocks, rows: int, device: torch.device) -> Made:
    """Lists of the queries', and a call that gives those of the keys'. The host waits for nothing."""
    if device.type != "cuda":
        return _of_queries(s, rows, device), lambda: _of_keys(s, rows, device), ()
    from saccade.ops.attend.flash4_lists import split

    return split(s, rows, device), lambda: _of_keys(s, rows, device), ()


def _of_queries(s: Blocks, rows: int, device: torch.device) -> Lists:
    """What `flash4_lists.split` says in one kernel. Entries of a row between two columns lie side by side."""
    q0, q1, k0, k1 = edges(s, rows, BLOCK, device)
    nqb, nkb = len(q0), len(k0)
    seen = whole = torch.full((nqb,), nkb, device=device)
    if s.causal:
        seen, whole = torch.searchsorted(k0, q1[:, 0]), torch.searchsorted(k1, q0[:, 0] + 1, right=True)
    entries = _entries(s, rows, (nqb, nkb), device)
    some = _between(entries, nkb, whole, seen, rows // BLOCK + 1)
    return Lists(*some, *_between(entries, nkb, torch.zeros_like(whole), whole, nkb))


def _of_keys(s: Blocks, rows: int, device: torch.device) -> Lists:
    """For each block of keys the blocks of queries that keep it."""
    q0, q1, k0, k1 = edges(s, rows, BLOCK, device)
    nqb, nkb = len(q0), len(k0)
    seen = whole = torch.zeros(nkb, dtype=torch.long, device=device)
    if s.causal:
        seen, whole = torch.searchsorted(q1[:, 0], k0, right=True), torch.searchsorted(q0[:, 0] + 1, k1)
    entries = _entries(s, rows, (nqb, nkb), device)
    turned = (entries % nkb) * nqb + entries // nkb
    turned = turned.masked_fill(entries == nqb * nkb, nqb * nkb).sort(-1).values
    some = _between(turned, nqb, seen, whole, -(-BLOCK // rows) + 1)
    return Lists(*some, *_between(turned, nqb, whole, torch.full_like(whole, nqb), nqb))


def _entries(s: Blocks, rows: int, grid: tuple[int, int], device: torch.device) -> Int[Tensor, "b h n"]:
    """row * nkb + column of the kept blocks in the library's sizes, ascending; at least one that stands for none."""
    nqb, nkb = grid
    crow, col = s.crow.to(device).long().contiguous(), s.col.to(device).long()
    each = torch.arange(col.shape[-1], device=device).expand_as(col).contiguous()
    row = torch.searchsorted(crow[..., 1:].contiguous(), each, right=True)
    tall, wide = s.q_block // rows, s.k_block // BLOCK
    row = (row[..., None] * tall + torch.arange(tall, device=device))[..., None]
    column = (col[..., None] * wide + torch.arange(wide, device=device))[..., None, :]
    there = (column >= 0) & (column < nkb) & (row < nqb)
    found = torch.where(there, row * nkb + column, nqb * nkb).flatten(-3)
    return F.pad(found.sort(-1).values if tall * wide > 1 else found, (0, 1), value=nqb * nkb)


def _between(
    entries: Int[Tensor, "b h n"], many: int, low: Int[Tensor, " r"], high: Int[Tensor, " r"], most: int
) -> tuple[Int[Tensor, "b h r"], Int[Tensor, "b h r w"]]:
    """Of the numbers row * many + minor: how many of each row have a minor in [low, high), and which those are."""
    b, h, n = entries.shape
    row = torch.arange(len(low), device=entries.device) * many
    start, end = (torch.searchsorted(entries, (row + x).expand(b, h, -1).contiguous()) for x in (low, high))
    width = max(1, min(most, many, n))
    at = (start[..., None] + torch.arange(width, device=entries.device)).clamp(max=n - 1)
    minor = (entries % many).int().gather(-1, at.flatten(-2)).view(at.shape)
    return (end - start).int(), minor


def of_spans(s: Spans, rows: int, device: torch.device) -> Made:
    """The same, and sinks and window of each head, which the rule reads."""
    sinks, window, seen, whole = span_tables(s, rows, BLOCK, device)
    return _of_tables(seen, whole), lambda: _of_tables(seen.mT.contiguous(), whole.mT.contiguous()), (sinks, window)


def _of_tables(seen: Bool[Tensor, "b h n m"], whole: Bool[Tensor, "b h n m"]) -> Lists:
    return Lists(*listed(seen & ~whole), *listed(seen & whole))
