"""The cache layer that stands in for transformers' growing layer: it hands the new keys on, tagged with itself, and the
attention function does the rest (it is the only place that has the queries)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from saccade.attach import far
from saccade.attach.states import Remembered
from saccade.attach.store import Store
from saccade.attach.tail import Tail, put_away
from saccade.core.errors import CannotRun
from saccade.core.site import Far

if TYPE_CHECKING:
    from saccade.attach.engine import Engine
    from saccade.attach.watch import Watch

States = dict[str, Remembered]  # by method


class SaccadeLayer(CacheLayerMixin):
    """One layer's cache. `seen` counts slots (padding included): positions, masks and prompt slicing depend on it."""

    is_sliding, is_croppable, is_compileable, supports_early_init = False, True, False, False

    def __init__(self, index: int, engine: Engine | None):
        super().__init__()
        self.index, self.engine = index, engine
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self._store: Store | None = None
        self.tail: Tail | None = None  # the newest tokens, beside the store, while a graph reads them
        self.prompt_done = False
        self.recording = False  # tokens may be taken back: eviction and packing wait for crop()
        self.far: list[Far | None] = []  # per sequence what lies in host memory
        self.queries: list[Tensor] = []  # per sequence the last queries [h w d], for methods that score with them
        self.states: States = {}
        self.prompt_states: States = {}  # as the prompt left them: what is there again when later tokens are taken back
        self.since: dict[str, Tensor] = {}  # ids and positions [b n] read after the prompt, where they are read again

    @property
    def store(self) -> Store | None:
        """What is stored. Whoever asks finds the newest tokens there, too: a tail is put away, but while it is read."""
        if self.tail is not None and not self.tail.live:
            put_away(self)
        return self._store

    @store.setter
    def store(self, store: Store | None) -> None:
        """Begin with nothing, or with another's."""
        self._store = store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember type and device."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they came, the keys tagged with this layer."""
        if self.engine is not None and not self.engine.run.attached:
            raise CannotRun(
                "use this cache",
                f"it was filled under {self.engine.run.title}, which is detached",
                "Start a new cache.",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        tagged = key_states.view_as(key_states)
        tagged._saccade_layer = self
        return tagged, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """In token coordinates; what is really stored concerns nobody outside."""
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._clear()

    def activate_past_recording(self) -> None:
        """Called before assisted decoding."""
        if self.engine is not None:
            self.engine.refuse_assisted(self.prompt_done)
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (zero or a negative number), then do the evictions that waited."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to take back")
        if self.store is None:
            return
        if tokens_to_remove and self.engine is not None:
            self.engine.refuse_taking_back()
        if tokens_to_remove:
            self._check_far(-tokens_to_remove)
            self.store.crop(-tokens_to_remove)
            self.seen += tokens_to_remove
            dated = {m.card.name for m in self.engine.parts.values() if m.dated} if self.engine else set()
            everyone = range(self.store.sequences)
            as_prompt = {name: states.select(everyone) for name, states in self.prompt_states.items()}
            self.states = as_prompt | {name: states for name, states in self.states.items() if name in dated}
            left = {name: max(0, x.shape[1] + tokens_to_remove) for name, x in self.since.items()}
            self.since = {name: self.since[name][:, :count].clone() for name, count in left.items()}
        if self.engine is not None:
            self.engine.evict(self)

    def _check_far(self, tokens: int) -> None:
        """Whether so many of the last tokens lie on the device.

        Raises:
            CannotRun: some do not.
        """
        near = [n - f.first - f.count for n, f in zip(self.store.seen if self.store else [], self.far) if f]
        if near and tokens > min(near):
            raise CannotRun(
                f"take {tokens} tokens back",
                f"only the last {min(near)} are on the device; those before lie in host memory, under an index that was"
                " built once",
                "Take back fewer, or read the prompt again.",
            )

    def far_of(self, sequences: Sequence[int]) -> tuple[Far, ...]:
        """What of these sequences, which are alike, lies in host memory."""
        return tuple(f for f in (self.far[i] for i in sequences if self.far) if f)

    def kept(self) -> list[list[Tensor]]:
        """True positions stored, per sequence and head, wherever."""
        if self.store is None:
            return []
        near = self.store.kept()
        for i, f in enumerate(self.far):
            if f:
                near[i] = [torch.cat([p[: f.first], q.cpu(), p[f.first :]]) for p, q in zip(near[i], f.positions)]
        return near

    def _select(self, index: Tensor) -> None:
        if self.store is None:
            return
        index = index.to(self.store.buckets[0].rows.device)
        self.store.select_sequences(index)
        order = index.tolist()
        self.states, self.prompt_states = (
            {name: states.select(order) for name, states in kind.items()}
            for kind in (self.states, self.prompt_states)
        )
        self.queries = [self.queries[i] for i in order] if self.queries else []
        self.far = [self.far[i] for i in order] if self.far else []
        self.since = {name: x[index.to(x.device)] for name, x in self.since.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.store is not None:
            self._select(torch.arange(self.store.sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def take_in(self, others: Sequence[SaccadeLayer]) -> None:
        """The sequences of other layers, whose prompts are read, join behind those that are here; shorter ones have
        padding before them, which is not stored."""
        assert self.store is not None and all(x.store is not None and x.prompt_done and not x.since for x in others)
        counts = [x.store.sequences for x in (self, *others)]
        for kind in ("states", "prompt_states"):
            mine = [getattr(x, kind) for x in (self, *others)]
            names = {name: None for states in mine for name in states}
            several = {n: [states.get(n) or Remembered(c) for c, states in zip(counts, mine)] for n in names}
            joined = {name: Remembered.joined(some) for name, some in several.items()}
            setattr(self, kind, joined)
        if any(x.far for x in (self, *others)):
            self.far = [f for c, x in zip(counts, (self, *others)) for f in x.far or [None] * c]
        self.store.take_in(x.store for x in others)
        self.seen = max(x.seen for x in (self, *others))

    def beginning(self, tokens: int) -> SaccadeLayer:
        """A copy of the first tokens of a prompt of one sequence that is not over yet, to go on with; memory is shared.

        Nothing was dropped so far, and what methods remember of the rest is left out.
        """
        assert self.store is not None and not self.store.dropped and not self.prompt_done
        made = SaccadeLayer(self.index, self.engine)
        made.dtype, made.device, made.is_initialized = self.dtype, self.device, True
        made.seen, made.store = tokens, copy.copy(self.store)
        if tokens < self.seen:
            made.store.crop(self.seen - tokens)
        return made

    def bytes_held(self) -> int:
        """Of all storages, each counted once: tokens and what lies beside them, and what methods remember."""
        remembered = [x for kind in (self.states, self.prompt_states) for r in kind.values() for x in r.tensors()]
        tensors = [*(self.store.tensors() if self.store else []), *self.queries, *remembered, *self.since.values()]
        return _storages(tensors) + self.bytes_host()

    def bytes_host(self) -> int:
        """Of what was moved to host memory."""
        return _storages([tensor for f in self.far if f for tensor in far.tensors(f)])

    def offload(self) -> None:
        """Offloading swaps whole tensors; our rows are ragged."""
        raise CannotRun("offload this cache", "saccade's cache layers are ragged", "Use the default cache.")


class WatchedLayer(DynamicLayer):
    """The model's own growing layer, which carries along what a probe noted of each of its tokens."""

    def __init__(self, run: Watch):
        super().__init__()
        self.run = run
        self._clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedLayer:
        """The run, and the model with it, is no part of a cache: both copies belong to it."""
        new = copy.copy(self)
        new.__dict__ = copy.deepcopy(self.__dict__, memo | {id(self.run): self.run})
        return new

    def _clear(self) -> None:
        self.notes: dict[str, Tensor] = {}  # each [b n ...], padding included
        self.prompt_slots = 0
        self.prompt_done = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the keys tagged with this layer."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        tagged = keys.view_as(keys)
        tagged._saccade_layer = self
        return tagged, values

    def bytes_held(self) -> int:
        """Of all storages, each counted once; none of keys and values where there was no cache."""
        return _storages([x for x in (self.keys, self.values, *self.notes.values()) if x is not None])

    def note(self, new: Mapping[str, Tensor], more_prompt: bool) -> None:
        """What was noted of the tokens just read [b q ...]; 0 where it was not."""
        first = self.notes or {name: x[:, :0] for name, x in new.items()}
        before, now = (next(iter(kind.values())).shape[1] for kind in (first, new))
        old = first | {name: _blank(x, before) for name, x in new.items() if name not in first}
        new = {name: _blank(x, now) for name, x in old.items() if name not in new} | dict(new)
        self.notes = {name: torch.cat([x, new[name]], 1) for name, x in old.items()}
        if not self.prompt_done:
            self.prompt_slots, self.prompt_done = before + now, not more_prompt

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._clear()

    def activate_past_recording(self) -> None:
        """Called before assisted decoding."""
        if not self.prompt_done:
            asked = f"assisted decoding with {self.run.title}"
            found = "guessed tokens are read together with the prompt, whose end is not to be told then"
            raise CannotRun(asked, found, "Use ordinary decoding.")

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (zero or a negative number)."""
        super().crop(tokens_to_remove)
        left = self.get_seq_length()
        self.notes = {name: x[:, :left] for name, x in self.notes.items()}
        self.prompt_slots = min(self.prompt_slots, left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        super().reorder_cache(beam_idx)
        self.notes = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.notes.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self.notes = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.notes.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        self.notes = {name: x[indices.to(x.device)] for name, x in self.notes.items()}


def _blank(like: Tensor, slots: int) -> Tensor:
    return like.new_zeros(like.shape[0], slots, *like.shape[2:])


def _storages(tensors: Sequence[Tensor]) -> int:
    """Bytes, each storage counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
