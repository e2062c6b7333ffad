"""A method at work in one layer of vLLM: prompts as they come, then one query of every request at a time."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from saccade import ops
from saccade.core.errors import CannotRun
from saccade.core.method import Cache, Decode, Method, Sparse, compose
from saccade.core.selection import Gather, Selection
from saccade.core.site import Seen, Site, Stage, State
from saccade_vllm.paging import Pages, Stored
from saccade_vllm.reaching import reach


@dataclass(frozen=True)
class Row:
    """The new tokens of one request: [start, stop) of the step's, the last of `seen`, and the request's blocks.

    first_block: by it a layer knows a request: it is nobody else's while the request runs
    """

    start: int
    stop: int
    seen: int
    prompt: bool
    table: Int[Tensor, " blocks"]
    first_block: int


class Work:
    """A method in one layer. What it remembers of a request is kept by the request's first block.

    requests: that run at once, at most; each has a token in every step, so that those of longest ago have ended
    handed: by first block, what one layer hands to those behind it within a step: one for all layers
    """

    def __init__(self, method: Method, site: Site, requests: int, handed: dict[int, State]):
        self.method, self.parts = method, compose([method])
        self.here = dataclasses.replace(site, attend=self._attend, partial=self._partial, searched=_uncounted)
        self.pages: Pages | None = None
        self.prompts: dict[int, int] = {}  # first block -> tokens of the prompt
        self.states: OrderedDict[int, State] = OrderedDict()
        self.requests, self.handed = requests, handed
        self.read, self.there = 0, 0  # keys that queries after the prompt read, and keys there were; of all heads

    # --- storing ----------------------------------------------------------------------------------------------------

    def write(
        self, kv_cache: Tensor, key: Float[Tensor, "n g d"], value: Float[Tensor, "n g d"], slots: Int[Tensor, " n"]
    ) -> None:
        """New keys and values, and what the method stores beside them."""
        if self.pages is None or self.pages.of != kv_cache.data_ptr():
            self.pages = Pages(kv_cache)
        real = (slots >= 0).nonzero()[:, 0]
        key, value = key[real], value[real]
        columns = {"keys": key, "values": value}
        if isinstance(self.parts.get("decode"), Decode):
            site = self._site("decode", len(real), len(real), 0)
            beside = self.parts["decode"].index(_heads_first(key), site)
            columns |= {name: x[0].transpose(0, 1) for name, x in beside.items()}
        self.pages.write(slots[real].long(), columns)

    # --- attention --------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Row], output: Tensor) -> None:
        """Of all tokens of a step, into `output` [n h d]."""
        if self.here.layer == 0:
            self.handed.clear()
        later = [row for row in rows if not row.prompt]
        for row in rows:
            if row.prompt:
                mine = (_heads_first(x[row.start : row.stop]) for x in (query, key, value))
                output[row.start : row.stop] = self._prompt(row, *mine)[0].transpose(0, 1)
        if later:
            at = torch.tensor([row.start for row in later], device=query.device)
            output[at] = self._later(later, query[at][:, :, None])[:, :, 0]

    def _prompt(self, row: Row, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "1 h n d"]:
        n = q.shape[2]
        if n != row.seen:
            found = f"{n} tokens came behind {row.seen - n}, as a part of it"
            raise CannotRun("read a prompt with a method of saccade", found, "Set enable_chunked_prefill=False.")
        self.prompts[row.first_block] = n
        self.states.pop(row.first_block, None)
        site = self._site("prefill", n, n, n)
        out, reader = self._read(q, k, v, site), self.parts.get("decode")
        if isinstance(reader, Decode) and reader.observe_tokens:
            site = dataclasses.replace(site, queries=0)
            positions = torch.arange(n, device=k.device).expand(*k.shape[:3])
            reader.begin(Seen(k, v, positions, q[:, :, -reader.observe_tokens :]), site)
        self._remember(row, site.state)
        return out

    def _read(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Float[Tensor, "1 h n d"]:
        """A whole prompt."""
        owner = self.parts.get("prefill")
        if owner is None:
            return self._dense(q, k, v)
        if isinstance(owner, Cache):
            selection = owner.select(q, k, site)
            return self._dense(q, k, v) if selection is None else site.attend(q, k, v, selection)
        if isinstance(owner, Decode):
            positions = torch.arange(site.keys, device=k.device).expand(*k.shape[:3])
            stored = {"keys": k, "values": v, "positions": positions, **owner.index(k, site)}
            return site.attend(q, k, v, owner.select(q, stored, site))
        return owner.attend(q, k, v, site)

    def _later(self, rows: Sequence[Row], q: Float[Tensor, "r h 1 d"]) -> Float[Tensor, "r h 1 d"]:
        """One new query of each request, together over what each reads."""
        for row in rows:
            if row.stop - row.start != 1:
                found = f"a request has {row.stop - row.start} new tokens after its prompt"
                raise CannotRun("decode with a method of saccade", found, "Leave speculative decoding off.")
        owner, each = self.parts.get("decode"), q.split(1)
        if isinstance(owner, Sparse):
            return torch.cat([self._whole(owner, row, one) for row, one in zip(rows, each)])
        lists = [self._choose(row, one) for row, one in zip(rows, each)]
        for row, chosen in zip(rows, lists):
            self._count(chosen, row)
        return self._over(rows, q, lists)

    def _whole(self, owner: Sparse, row: Row, q: Float[Tensor, "1 h 1 d"]) -> Float[Tensor, "1 h 1 d"]:
        """By a method that is given all keys there are."""
        stored = Stored(self.pages, row.table, row.seen)
        site = self._site("decode", 1, row.seen, row.seen, self._recall(row))
        out = owner.attend(q, stored["keys"], stored["values"], site)
        self._remember(row, site.state)
        return out

    def _choose(self, row: Row, q: Float[Tensor, "1 h 1 d"]) -> Int[Tensor, "g|h m"]:
        """Positions of the keys that a request's new query reads, for each head of one kind; -1: none."""
        owner, n = self.parts.get("decode"), row.seen
        if isinstance(owner, Decode):
            site = self._site("decode", 1, n, n, self._recall(row))
            site = dataclasses.replace(site, handed=self.handed.setdefault(row.first_block, {}))
            selection = owner.select(q, Stored(self.pages, row.table, n), site)
            self._remember(row, site.state)
            return _listed(selection, q.device)
        if "evict" not in self.parts:
            return torch.arange(n, device=q.device)[None]
        seen = reach(self.parts["evict"], self.here, self.prompts[row.first_block], n - 1)
        if len(set(seen)) == 1:
            return _ends(*seen[0], n, q.device)[None]
        ends = [_ends(*pair, n, q.device) for pair in seen]
        return torch.stack([pad(x, (0, max(map(len, ends)) - len(x)), value=-1) for x in ends])

    def _over(
        self, rows: Sequence[Row], q: Float[Tensor, "r h 1 d"], lists: Sequence[Int[Tensor, "a m"]]
    ) -> Float[Tensor, "r h 1 d"]:
        """Attention of each query over its lists, whose keys alone are read from the blocks."""
        heads, g = max(len(x) for x in lists), self.here.kv_heads
        heads = heads if heads > 1 else g
        wide = max(x.shape[1] for x in lists)
        at = torch.stack([pad(x, (0, wide - x.shape[1]), value=-1).expand(heads, -1) for x in lists])
        slots = torch.stack([self.pages.slots(row.table, x.clamp(min=0)) for row, x in zip(rows, at)])
        keys, values = (self.pages.read(name, slots) for name in ("keys", "values"))
        visible = None
        if bool((at < 0).any()):
            visible = (at >= 0).repeat_interleave(self.here.heads // heads, 1)[:, :, None]
        return ops.decode(q, keys, values, visible=visible, scale=self.here.scale, softcap=self.here.softcap)[0]

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.decode(q, k, v, scale=self.here.scale, softcap=self.here.softcap)[0]

    # --- what a method is told, and remembers -----------------------------------------------------------------------

    def _site(self, stage: Stage, queries: int, keys: int, seen: int, state: State | None = None) -> Site:
        return dataclasses.replace(
            self.here, stage=stage, queries=queries, keys=keys, seen=seen, settled=stage == "decode",
            state={} if state is None else state,
        )  # fmt: skip

    def _recall(self, row: Row) -> State:
        return dict(self.states.get(row.first_block, {}))

    def _remember(self, row: Row, state: State) -> None:
        if not state:
            return
        self.states[row.first_block] = state
        self.states.move_to_end(row.first_block)
        while len(self.states) > 2 * self.requests:
            self.states.popitem(last=False)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
        return self._partial(q, k, v, selection)[0]

    def _partial(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        return ops.attend(q, k, v, selection, scale=self.here.scale, softcap=self.here.softcap)

    def _count(self, chosen: Int[Tensor, "a m"], row: Row) -> None:
        heads = self.here.kv_heads if len(chosen) == 1 else len(chosen)
        self.read += int((chosen >= 0).sum()) * heads // len(chosen)
        self.there += row.seen * heads


def _heads_first(x: Float[Tensor, "n a d"]) -> Float[Tensor, "1 a n d"]:
    return x.transpose(0, 1)[None]


def _ends(sinks: int, recent: int, keys: int, device: torch.device) -> Int[Tensor, " m"]:
    """Positions of the first and the recent tokens, the newest of so many among them."""
    after = max(0, keys - 1 - recent)
    return torch.cat([torch.arange(min(sinks, after), device=device), torch.arange(after, keys, device=device)])


def _listed(selection: Selection, device: torch.device) -> Int[Tensor, "a m"]:
    """The keys of a selection of one query, in lists: one for all heads, or for each head of one kind."""
    if isinstance(selection, Gather) and selection.ranges is None:
        return selection.index[0, :: selection.shared, 0].long()
    if getattr(selection, "dense", False):
        return torch.arange(selection.keys, device=device)[None]
    mask = selection.mask()[0, :, 0]
    order = mask.int().argsort(-1, descending=True, stable=True)
    return order.masked_fill(~mask.gather(-1, order), -1)[:, : int(mask.sum(-1).max())]


def _uncounted(looked: int, there: int) -> Any:
    """What a search cost is not noted here."""
