"""What happens in one attention layer: store the new tokens, ask the methods where to look, compute, let go."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saccade import ops
from saccade.attach import eviction, far, marking, packing, reading, tail
from saccade.attach.counts import Counts
from saccade.attach.layer import SaccadeLayer
from saccade.attach.states import Remembered, owned
from saccade.attach.store import Bucket, Store, by_head
from saccade.core.errors import CannotRun, DoesNotCompose
from saccade.core.method import Cache, Decode, Method
from saccade.core.selection import Gather, Selection, Spans
from saccade.core.site import Site, Stage, State, Turn

if TYPE_CHECKING:
    from saccade.attach.run import Run


@dataclass(frozen=True)
class Place:
    """What is known of an attention module before it runs: from the probe forward."""

    layer: int  # among the full-attention layers
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    softcap: float | None
    turn: Turn | None = None  # how queries move along the text, where it is known


class Engine:
    """The methods at work in one attention module. Holds no per-sequence state: that lies in the cache layer."""

    def __init__(self, run: Run, place: Place):
        self.run, self.place = run, place
        self.parts: dict[str, Method] = run.parts
        self.counts = Counts(functools.partial(run.layer_record, self))

    # --- one forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        layer: SaccadeLayer | None,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b g q d"],
        v: Float[Tensor, "b g q d"],
        real: Bool[Tensor, "b q"] | None,
    ) -> Float[Tensor, "b h q d"]:
        """Attention of the new tokens over what is stored and themselves. Outputs at padding are zero."""
        if layer is not None and layer.tail is not None and layer.tail.live:
            return tail.forward(self, layer, q, k, v)
        if layer is None or not layer.prompt_done or not self._weighing:
            return self._forward(layer, q, k, v, real)
        each = (t.split(1, 2) for t in (q, k, v))
        masks = [None] * q.shape[2] if real is None else real.split(1, 1)
        return torch.cat([self._forward(layer, *token, some) for *token, some in zip(*each, masks)], 2)

    @property
    def _weighing(self) -> bool:
        """Whether every token after the prompt decides what goes before the next one looks."""
        evictor = self.parts.get("evict")
        return isinstance(evictor, Cache) and evictor.weighing

    @property
    def _evicting(self) -> bool:
        """Whether keys go after the prompt, too."""
        evictor = self.parts.get("evict")
        return isinstance(evictor, Cache) and (evictor.rolling or evictor.weighing)

    def _forward(
        self, layer: SaccadeLayer | None, q: Tensor, k: Tensor, v: Tensor, real: Bool[Tensor, "b q"] | None
    ) -> Float[Tensor, "b h q d"]:
        layer = layer or SaccadeLayer(self.place.layer, self)  # without a cache: one that is forgotten afterwards
        if layer.store is None:
            layer.store = Store(k.shape[0], k.shape[1])
            self.run.begin(self, layer)
        if self.place.layer == 0:
            self.run.handed.clear()  # of a forward that broke off
        stage: Stage = "decode" if layer.prompt_done else "prefill"
        layer.store.move(k.device)
        layer.store.append(self.columns(k, v, layer, stage), real)
        out = self.attend(layer, q, real, stage)
        self._remember(layer, q, real)
        self._put_by(layer)
        if stage == "prefill" and not self.run.more_prompt:
            layer.prompt_done = True
        if not layer.recording:
            self.evict(layer, prompt_end=stage == "prefill" and layer.prompt_done)
        if stage == "decode" and self._weighing:
            eviction.evict_by_weight(self, layer)
        if self.place.layer == self.place.layers - 1:
            self.run.handed.clear()
        return out

    def _put_by(self, layer: SaccadeLayer) -> None:
        """Between the parts of a prompt, what will lie in host memory already does: one layer is on the device."""
        reader = self.parts.get("decode")
        if self.run.more_prompt and not layer.prompt_done and isinstance(reader, Decode) and reader.shelves:
            layer.store.move(torch.device("cpu"))

    def columns(self, k: Tensor, v: Tensor, layer: SaccadeLayer, stage: Stage) -> dict[str, Tensor]:
        """All that is stored of new tokens."""
        columns = {"keys": k, "values": v}
        reader, evictor = self.parts.get("decode"), self.parts.get("evict")
        if isinstance(evictor, Cache) and evictor.tallies:
            columns["tally"] = k.new_zeros(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32))
        columns |= marking.columns(self, k, layer)
        if isinstance(reader, Decode):
            columns |= reader.index(k, self.site(layer, stage, k.shape[2], k.shape[2], 0))
        return columns

    def attend(self, layer: SaccadeLayer, q: Tensor, real: Tensor | None, stage: Stage) -> Tensor:
        """Attention over what is stored, the new tokens among it, and over what lies in a tail beside it."""
        assert layer.store is not None
        store, n = layer.store, q.shape[2]
        counts = [n] * q.shape[0] if real is None else real.sum(-1).tolist()
        by_row, out = _by_row(q, store.kv_heads), None
        for count, rows in self._alike(layer, stage, store.pieces(counts)):
            if not count:
                continue
            whole = rows.rows.shape[0] == by_row.shape[0]
            tokens = None if real is None or count == n else _real_tokens(real, rows.rows // store.kv_heads, count)
            mine = by_row if whole else by_row.index_select(0, rows.rows)
            mine = mine if tokens is None else mine.gather(2, _wide(tokens, mine))
            rows = marking.marked(self, layer, rows, mine, stage)
            done = tail.joined(self, layer, rows, mine, *self._piece(layer, rows, mine, stage))
            self._tally(layer, rows, mine, stage)
            if whole and tokens is None:
                out = done
                break
            if out is None:
                out = torch.zeros(*by_row.shape[:3], done.shape[-1], dtype=q.dtype, device=q.device)
            if tokens is None:
                out = out.index_copy(0, rows.rows, done)
            else:
                out = out.index_copy(
                    0, rows.rows, torch.zeros_like(out[rows.rows]).scatter(2, _wide(tokens, done), done)
                )
        if out is None:  # nothing but padding
            return torch.zeros_like(q)
        return _by_sequence(out, store.kv_heads)

    def _tally(self, layer: SaccadeLayer, rows: Bucket, q: Float[Tensor, "r s q d"], stage: Stage) -> None:
        evictor = self.parts.get("evict")
        if isinstance(evictor, Cache) and evictor.tallies:
            seen = layer.store.seen[layer.store.sequence_of(rows)[0]]
            site = self.site(layer, stage, q.shape[2], rows.length, seen, part="evict")
            layer.store.add("tally", rows.rows, evictor.tally(q, rows.columns["keys"], site))

    def _alike(
        self, layer: SaccadeLayer, stage: Stage, pieces: Iterable[tuple[int, Bucket]]
    ) -> Iterator[tuple[int, Bucket]]:
        """The pieces, taken apart until what a method is told of one holds for all of its sequences: how many tokens
        went by, what it remembers, whose shapes may differ, and how much of it lies in host memory.
        """
        owner, seen = self.parts.get(stage), layer.store.seen
        if owner is None:
            yield from pieces
            return
        states = layer.states.get(owner.card.name) or Remembered(layer.store.sequences)
        lying = [tuple((f.first, f.count) for f in layer.far_of([i])) for i in range(len(seen))]
        kinds = list(zip(seen, states.kinds(), lying, [self.coming(layer, [i]) for i in range(len(seen))]))
        if len(set(kinds)) == 1:  # so that the device need not be asked
            yield from pieces
            return
        for count, rows in pieces:
            for _, part in layer.store.parts(rows, [kinds[i] for i in layer.store.sequence_of(rows)]):
                yield count, part

    def sequences(self, layer: SaccadeLayer, rows: Bucket, owner: Method) -> list[int]:
        """The sequences of a piece, for a method that reads all of their heads.

        Raises:
            DoesNotCompose: some of their heads have another number of keys.
        """
        ids = layer.store.whole_sequences(rows)
        if ids is None:
            raise DoesNotCompose(
                f"attach {self.run.title}",
                f"{owner.card.name!r} reads all heads of a sequence together, and the eviction left them unequal",
                "Use an eviction that keeps the same number of keys in every head.",
            )
        return ids

    def _piece(
        self, layer: SaccadeLayer, rows: Bucket, q: Float[Tensor, "r s q d"], stage: Stage
    ) -> tuple[Float[Tensor, "r s q d"], Float[Tensor, "r s q"] | None]:
        """Rows of one length, with as many new tokens each; the log-sum-exp where it can be told."""
        owner = self.parts.get(stage)
        if owner is None or (stage == "prefill" and layer.store.dropped):
            return self._dense(layer, rows, q, stage)
        ids, g = self.sequences(layer, rows, owner), layer.store.kv_heads
        stored = by_head({**rows.columns, "positions": rows.positions}, g)
        q = _by_sequence(q, g)
        shelved = layer.far_of(ids)
        keys = rows.length + sum(f.count for f in shelved[:1])
        site = self.site(layer, stage, q.shape[2], keys, layer.store.seen[ids[0]], ids)
        site, note = marking.told(site, stored), None
        if stage == "decode" and self.run.note_reads:
            # where some lie in host memory nothing was dropped, so that places are positions
            position = torch.arange(keys)[None, None] if shelved else stored["positions"]
            note = functools.partial(reading.note, self.run.layer_record(self), ids, position, q.shape[1])
            site = reading.noting(site, note)
        lse = None
        if isinstance(owner, Decode):
            selection = owner.select(q, stored, site)
            if shelved:
                if note is not None:
                    note(selection)
                self.counts.later(q, selection)
                options = {"scale": self.place.scale, "softcap": self.place.softcap}
                out, lse = far.attend(q, stored, shelved, selection, **options)
            else:
                out, lse = site.partial(q, stored["keys"], stored["values"], selection)
        elif isinstance(owner, Cache):
            selection = owner.select(q, stored["keys"], site)
            if selection is None:
                return self._dense(layer, rows, _by_row(q, g), stage)
            out = site.attend(q, stored["keys"], stored["values"], selection)
        else:
            out = owner.attend(q, stored["keys"], stored["values"], site)
        self.keep_state(layer, owner, site, ids)
        return _by_row(out, g), lse if lse is None else _by_row(lse, g)

    def _dense(
        self, layer: SaccadeLayer, rows: Bucket, q: Float[Tensor, "r s q d"], stage: Stage
    ) -> tuple[Float[Tensor, "r s q d"], Float[Tensor, "r s q"]]:
        """Everything that is stored and that the eviction rule lets each query see."""
        queries = q.shape[2]
        visible = self._visible(layer, rows, queries, stage)
        seen = [layer.store.seen[i] for i in layer.store.sequence_of(rows)]
        self.counts.dense(seen, rows, q, stage, visible)
        evictor, packer = self.parts.get("evict"), self.parts.get("pack")
        merges = isinstance(evictor, Cache) and evictor.merges and layer.store.dropped
        if merges and (visible is not None or any(n != rows.length for n in seen)):  # else they have lost nothing
            return self._merged(evictor, rows, q, visible)
        if isinstance(packer, Cache) and stage == "decode":
            return packing.attend(packer, rows, q, scale=self.place.scale, softcap=self.place.softcap)
        keys, values = rows.columns["keys"], rows.columns["values"]
        options = {"scale": self.place.scale, "softcap": self.place.softcap}
        ids = None if visible is not None else layer.store.whole_sequences(rows)
        if ids is None:
            mask = None if visible is None else visible[:, None]
            return ops.decode(q, keys[:, None], values[:, None], visible=mask, **options)
        g = layer.store.kv_heads
        keys, values = (x.unflatten(0, (-1, g)) for x in (keys, values))
        out, lse = ops.decode(_by_sequence(q, g), keys, values, **options)
        return _by_row(out, g), _by_row(lse, g)

    def _merged(
        self, method: Cache, rows: Bucket, q: Float[Tensor, "r s q d"], visible: Bool[Tensor, "r q k"] | None
    ) -> tuple[Float[Tensor, "r s q d"], Float[Tensor, "r s q"]]:
        """Dense, where some keys stand for several tokens. Queries that see the same go together; what they no longer
        see is merged for them as the eviction after the token before them would have."""
        new, out = q.shape[2], []
        for first, last in _stretches(visible, new):
            there = rows.length - new + last
            position = rows.positions[:, :there]
            keys, values = (rows.columns[name][:, :there] for name in ("keys", "values"))
            stays, seen = None if visible is None else visible[:, first, :there], None
            if stays is not None and not bool(stays.all()):
                seen = stays[:, None, None].expand(-1, 1, last - first, -1)
                keys, values = method.merge(keys, values, position, stays)
            several = method.stands_for(position, stays)
            merged = several and tuple(x[:, None] for x in several)
            options = {"scale": self.place.scale, "softcap": self.place.softcap, "visible": seen, "merged": merged}
            out.append(ops.decode(q[:, :, first:last], keys[:, None], values[:, None], **options))
        outs, lses = zip(*out)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _visible(self, layer: SaccadeLayer, rows: Bucket, queries: int, stage: Stage) -> Tensor | None:
        evictor = self.parts.get("evict")
        if not isinstance(evictor, Cache) or (stage == "prefill" and "prefill" not in evictor.parts):
            return None
        decoding = stage == "decode" and (layer.tail is not None or not self._evicting)
        if decoding or type(evictor).visible is Cache.visible:
            return None  # all that is stored: without asking the device which rows these are
        gone = eviction.out_of_reach(self, evictor, layer, rows, -1) if queries == 1 else None
        if gone is not None and not any(count for _, count in gone):
            return None
        ids = layer.store.sequence_of(rows)
        last = torch.tensor([layer.store.seen[i] for i in ids], device=rows.rows.device)
        at = last[:, None] + torch.arange(-queries, 0, device=last.device)
        site = self.site(layer, stage, queries, rows.length, layer.store.seen[ids[0]], ids, "evict")
        return evictor.visible(at, rows.positions, rows.rows % layer.store.kv_heads, site)

    def evict(self, layer: SaccadeLayer, prompt_end: bool = False) -> None:
        """Drop what the methods give up now, and let begin what begins when the prompt has ended."""
        eviction.evict(self, layer, prompt_end)

    def refresh(self, layer: SaccadeLayer, tokens: int) -> None:
        """Let a reader look at the last tokens of every sequence, which were stored without its being asked."""
        reader = self.parts.get("decode")
        if not isinstance(reader, Decode) or reader.card.name not in layer.states:
            return
        for _, rows in self._alike(layer, "decode", layer.store.pieces([tokens] * layer.store.sequences)):
            ids = self.sequences(layer, rows, reader)
            site = self.site(layer, "decode", tokens, rows.length, layer.store.seen[ids[0]], ids)
            reader.refresh(by_head({**rows.columns, "positions": rows.positions}, layer.store.kv_heads), site)
            self.keep_state(layer, reader, site, ids)

    # --- what cannot be taken back ----------------------------------------------------------------------------------

    def refuse_taking_back(self) -> None:
        """Tokens whose queries have decided what went cannot be unread.

        Raises:
            CannotRun: the eviction goes by the weights of every token.
        """
        if self._weighing:
            found = f"{self.parts['evict'].card.name!r} has dropped keys by the weights of these tokens"
            raise CannotRun(f"take tokens back under {self.run.title}", found, "Read the prompt again.")

    def refuse_assisted(self, prompt_done: bool) -> None:
        """Assisted decoding verifies guesses in the prompt's own forward, unless that is done, and takes the wrong ones
        back.

        Raises:
            CannotRun: a method decides at the end of the prompt, or computes the prompt and later tokens differently.
        """
        stiff = {m.card.name for m in self.parts.values() if not _pliant(m, prompt_done)}
        if stiff:
            raise CannotRun(
                f"assisted decoding with {', '.join(sorted(stiff))}",
                "guessed tokens are verified together with the prompt, where the method would treat them as prompt",
                "Use ordinary decoding, or a rolling cache such as 'streaming'.",
            )

    # --- small things -----------------------------------------------------------------------------------------------

    def _remember(self, layer: SaccadeLayer, q: Tensor, real: Tensor | None) -> None:
        """Keep the last queries of the prompt, or later the newest, for methods that score with them."""
        wanted = max((m.observe_tokens for m in self.parts.values() if isinstance(m, (Cache, Decode))), default=0)
        if not wanted or (layer.prompt_done and not self._weighing):
            return
        old = layer.queries or [q.new_empty(q.shape[1], 0, q.shape[3])] * q.shape[0]
        new = [q[i, :, -wanted:] if real is None else q[i][:, real[i]][:, -wanted:] for i in range(len(q))]
        layer.queries = [torch.cat([a, b], 1)[:, -wanted:].clone() for a, b in zip(old, new)]

    def site(
        self, layer: SaccadeLayer, stage: Stage, queries: int, keys: int, seen: int, ids: list[int] | None = None,
        part: str = "",
    ) -> Site:
        """What a method is told: the owner of `part`; else, without queries, of the eviction, or of the stage."""
        owner = self.parts.get(part or ("evict" if queries == 0 else stage))
        place = self.place
        return Site(
            layer=place.layer, layers=place.layers, heads=place.heads, kv_heads=place.kv_heads,
            head_size=place.head_size, stage=stage, queries=queries, keys=keys, seen=seen, scale=place.scale,
            budget=self.run.budget, softcap=place.softcap, seed=self.run.seed, bytes_per_token=self.run.bytes_per_token,
            settled=stage == "decode" and not self._evicting, state=_gather_state(layer, owner, ids),
            coming=self.coming(layer, ids), handed=self._handed(owner, ids), turn=place.turn, shard=self.run.shard,
            far=layer.far_of(ids or []) if stage == "decode" else (),
            attend=lambda *inputs: self._compute(stage, *inputs)[0], partial=functools.partial(self._compute, stage),
            searched=self.counts.searched,
        )  # fmt: skip

    def coming(self, layer: SaccadeLayer, ids: list[int] | None = None) -> int:
        """Tokens of the prompt that these sequences, or any of the layer, have yet to read, where that was said."""
        seen, told = layer.store.seen if layer.store else [], self.run.prompt_tokens
        if layer.prompt_done or len(told) != len(seen):
            return 0
        return max(0, *(told[i] - seen[i] for i in (range(len(seen)) if ids is None else ids)))

    def _handed(self, owner: Method | None, ids: list[int] | None) -> State:
        """What the same sequences were handed in the layers before: without an eviction they are together in all."""
        if ids is None or not isinstance(owner, Decode) or not owner.persistent:
            return {}
        return self.run.handed.setdefault(tuple(ids), {})

    def _compute(
        self, stage: Stage, q: Tensor, k: Tensor, v: Tensor, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """What `Site.partial` does, and `Site.attend`: compute, and note what was computed."""
        options = {"scale": self.place.scale, "softcap": self.place.softcap}
        if stage == "prefill":
            self.counts.pending.append(selection)
            return ops.attend(q, k, v, selection, **options)
        self.counts.later(q, selection)
        if isinstance(selection, Spans) and selection.dense and selection.causal:
            return ops.decode(q, k, v, **options)
        if isinstance(selection, Gather) and selection.q_block == 1 and selection.ranges is None and selection.causal:
            return ops.decode(q, k, v, selection.index[:, :: selection.shared], **options)
        return ops.attend(q, k, v, selection, **options)

    def keep_state(self, layer: SaccadeLayer, method: Method, site: Site, ids: list[int]) -> None:
        """What a method left in `site.state` is remembered for each of these sequences; not while a tail is there: the
        stored keys stay as they are, and a graph's memory is its own."""
        if not site.state or layer.tail is not None:
            return
        state = owned(site.state)
        for kind in [layer.states] + [layer.prompt_states] * (site.stage == "prefill" and not method.dated):
            kind.setdefault(method.card.name, Remembered(layer.store.sequences)).keep(ids, state)


def _pliant(method: Method, prompt_done: bool) -> bool:
    """Whether it treats a token alike, in the prompt's forward or after it, and drops none that may be taken back."""
    if "pack" in method.parts and set(method.parts) <= {"prefill", "pack"}:
        return prompt_done
    return isinstance(method, Cache) and method.rolling and (prompt_done or "prefill" in method.parts)


def _stretches(visible: Bool[Tensor, "r q k"] | None, queries: int) -> list[tuple[int, int]]:
    """[first, last) of the queries one after the other that see the same, but for causality."""
    if visible is None:
        return [(0, queries)]
    other = (visible[:, 1:] != visible[:, :-1]).any(-1).any(0)
    cuts = [0, *(other.nonzero()[:, 0] + 1).tolist(), queries]
    return list(itertools.pairwise(cuts))


def _gather_state(layer: SaccadeLayer, owner: Method | None, ids: list[int] | None) -> dict[str, Tensor]:
    if owner is None or ids is None or owner.card.name not in layer.states:
        return {}
    return layer.states[owner.card.name].gather(ids)


def _real_tokens(real: Tensor, sequence: Tensor, count: int) -> Tensor:
    """[r count]: which of the new tokens are real, per row."""
    return real[sequence].nonzero()[:, 1].view(len(sequence), count)


def _wide(tokens: Tensor, like: Tensor) -> Tensor:
    """Token numbers [r m] as an index into [r s q d]."""
    return tokens[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _by_row(x: Float[Tensor, "b h q *d"], kv_heads: int) -> Float[Tensor, "r s q *d"]:
    """Rows are (sequence, key/value head) pairs with their query heads."""
    return x.unflatten(1, (kv_heads, -1)).flatten(0, 1)


def _by_sequence(x: Float[Tensor, "r s q d"], kv_heads: int) -> Float[Tensor, "b h q d"]:
    return x.unflatten(0, (-1, kv_heads)).flatten(1, 2)
