"""A method at work in a model: attached, recorded, detached again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from saccade.attach import compat, replay, reread
from saccade.attach.engine import Engine, Place
from saccade.attach.layer import SaccadeLayer, WatchedLayer
from saccade.attach.probe import Found
from saccade.attach.sequence import Text
from saccade.core.budget import Budget
from saccade.core.errors import CannotRun
from saccade.core.method import Decode, Method, compose
from saccade.core.record import LayerRecord, Record
from saccade.core.site import State


class Run:
    """The handle that `attach` returns: a context manager, `detach()`, and the record.

    While it is attached, `model.generate()` and `model()` work as ever; caches that they make hold what the methods
    decide. `record` is that of the last sequence. With `note_reads` it also says which keys the queries after the
    prompt read, which takes the whole mask of each of their forwards.
    """

    slot = "_saccade"

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        budget: Budget,
        seed: int,
        found: Found,
        graph_tokens: int = 0,
    ):
        self.model, self.methods, self.budget, self.seed = model, list(methods), budget, seed
        self.parts = compose(methods)
        self.title = " + ".join(m.card.name for m in self.methods)
        self.graph_tokens = graph_tokens
        self.bytes_per_token, self.shard = found.bytes_per_token, found.shard
        self.attached = False
        self.note_reads = False
        self.more_prompt = False  # the prompt goes on after this forward (chunked prefill)
        self.prompt_tokens: list[int] = []  # how many it will have, of each sequence; empty: nobody said
        self.handed: dict[tuple[int, ...], State] = {}  # sequences -> what their layers hand on in this forward
        self.text = Text(self, found.sharing) if found.sharing else None
        self._record = Record()
        self._layers: dict[int, SaccadeLayer] = {}  # the last cache layer that each engine worked on
        self._engines = {site.module: self._engine(site.place) for site in found.sites}
        self._undo: list[Callable[[], None]] = []

    def _engine(self, place: Place) -> Any:
        """What works in one attention module, as its attribute `slot`."""
        return Engine(self, place)

    def _layer(self, index: int, engine: Any) -> Any:
        """What stands in for a plain cache layer."""
        return SaccadeLayer(index, engine)

    # --- on and off -------------------------------------------------------------------------------------------------

    def _enter(self) -> Run:
        self.attached = True
        self._undo.append(compat.switch(self.model))
        for module, engine in self._engines.items():
            setattr(module, self.slot, self.text.before(engine) if self.text else engine)
            self._undo.append(functools.partial(delattr, module, self.slot))
        handle = self.model.register_forward_pre_hook(self._give_cache, with_kwargs=True)
        self._undo.append(handle.remove)
        self._undo += self.text.hook(self.model) if self.text else []
        if hasattr(self.model, "generate"):
            self._wrap("_prepare_cache_for_generation", self._prepare_cache)
            self._wrap("_prefill", self._prefill)
        if self.graph_tokens:
            self._replace_forward()
        self.model._saccade_run = self
        self._undo.append(functools.partial(delattr, self.model, "_saccade_run"))
        return self

    def _wrap(self, name: str, wrapper: Callable) -> None:
        original = getattr(self.model, name)
        setattr(self.model, name, functools.partial(wrapper, original))
        self._undo.append(lambda: self.model.__dict__.pop(name))

    def _replace_forward(self) -> None:
        own = self.model.__dict__.get("forward")  # who has put one there will want it back
        self.model.forward = replay.Replayer(self, self.model.forward, self.graph_tokens)
        self._undo.append(lambda: setattr(self.model, "forward", own) if own else delattr(self.model, "forward"))

    def detach(self) -> None:
        """Put the model back exactly as it was. Doing it twice changes nothing."""
        self.attached = False
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<saccade.Run {self.title} budget={self.budget} {state}>"

    # --- caches -----------------------------------------------------------------------------------------------------

    def new_cache(self) -> Any:
        """An empty cache of this run, to give to forwards; `generate` and `model(use_cache=True)` make their own."""
        return self._equip(compat.new_cache(self.model))

    def _equip(self, cache: Any) -> Any:
        """Put our layers in the place of the plain ones."""
        if not compat.is_growing_cache(cache):
            raise CannotRun(
                f"run {self.title} with a {type(cache).__name__}",
                "its layers are of a fixed size, quantised or offloaded, and cannot be replaced",
                "Leave cache_implementation away, and the cache that was given.",
            )
        engines = {module.layer_idx: engine for module, engine in self._engines.items()}
        layers = cache.layers or compat.new_cache(self.model).layers
        if any(isinstance(layer, SaccadeLayer) or getattr(layer, "run", None) is self for layer in layers):
            return cache
        filled = [layer for layer in layers if compat.is_plain_layer(layer) and layer.get_seq_length()]
        if filled or any(isinstance(layer, WatchedLayer) for layer in layers):
            raise CannotRun(
                f"continue this cache under {self.title}",
                "it was filled before attaching",
                "Start with an empty cache.",
            )
        cache.layers = [
            self._layer(i, engines[i]) if compat.is_plain_layer(layer) and i in engines else layer
            for i, layer in enumerate(layers)
        ]
        cache.layer_class_to_replicate = None
        return cache

    def _give_cache(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        wanted = kwargs.get("use_cache")
        wanted = getattr(model.config.get_text_config(), "use_cache", True) if wanted is None else wanted
        wanted = wanted and not (self.text and self.text.ring)
        if not self._equip_given(kwargs) and wanted and not (model.training and torch.is_grad_enabled()):
            kwargs[compat.CACHE] = self.new_cache()
        self._keep_up(args, kwargs)
        return args, kwargs

    def _keep_up(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """For a method that has tokens read again after a while: see to it before the next are read."""
        reader = self.parts.get("decode")
        cache = next((kwargs[name] for name in compat.CACHES if kwargs.get(name) is not None), None)
        if cache is not None and isinstance(reader, Decode) and reader.reread_tokens:
            ids = kwargs.get("input_ids", args[0] if args else None)
            reread.keep_up(self, cache, reader.reread_tokens, ids, kwargs)

    def _equip_given(self, kwargs: dict[str, Any]) -> bool:
        """Equip the cache among the arguments; whether there is one."""
        given = [name for name in compat.CACHES if kwargs.get(name) is not None]
        kwargs.update({name: self._equip(kwargs[name]) for name in given})
        return bool(given)

    def _prepare_cache(self, original: Callable, generation_config: Any, model_kwargs: dict, *rest: Any) -> Any:
        result = original(generation_config, model_kwargs, *rest)
        self._equip_given(model_kwargs)
        return result

    # --- the prompt -------------------------------------------------------------------------------------------------

    def _prefill(
        self, original: Callable, input_ids: Any, generation_config: Any, model_kwargs: dict, *rest: Any, **kw: Any
    ):
        if generation_config.prefill_chunk_size is None:
            return original(input_ids, generation_config, model_kwargs, *rest, **kw)
        with self.prompt(tokens=_lengths(input_ids, model_kwargs.get("attention_mask"))):
            return original(input_ids, generation_config, model_kwargs, *rest, **kw)

    @contextlib.contextmanager
    def prompt(self, *, ends: bool = True, tokens: Sequence[int] = ()) -> Iterator[None]:
        """Forwards in here are parts of one prompt; what happens at the end of the prompt happens on leaving, or, if it
        does not end there, in a later forward or block.

        tokens: how many each sequence will have, for methods that go by the length of a prompt

        with run.prompt():
            for chunk in ids.split(512, dim=1):
                out = model(chunk, past_key_values=cache)  # from transformers 5.24 on: cache=cache
        """
        self.more_prompt, self.prompt_tokens = True, list(tokens)
        try:
            yield
        finally:
            self.more_prompt, self.prompt_tokens = False, []
        for engine in self._engines.values() if ends else ():
            layer = self._layers.get(engine.place.layer)
            if layer is not None and not layer.prompt_done:
                layer.prompt_done = True
                self._end_prompt(engine, layer)

    def _end_prompt(self, engine: Any, layer: Any) -> None:
        engine.evict(layer, prompt_end=True)

    # --- the record -------------------------------------------------------------------------------------------------

    def begin(self, engine: Engine, layer: SaccadeLayer) -> None:
        """An engine meets an empty cache: the record of that layer starts anew."""
        index = engine.place.layer
        self._layers[index] = layer
        self._record.layers[index] = LayerRecord(index)
        engine.counts.clear()

    def layer_record(self, engine: Engine) -> LayerRecord:
        """The entry of this engine's layer."""
        return self._record.layer(engine.place.layer)

    @property
    def record(self) -> Record:
        """What the last sequence left: tokens kept, bytes held, pairs computed, per layer and head."""
        for engine in self._engines.values():
            layer = self._layers.get(engine.place.layer)
            store = layer.store if layer is not None else None  # first: asking for it counts what was beside it
            engine.counts.settle()
            if store is not None:
                entry = self.layer_record(engine)
                entry.seen, entry.kept = list(store.seen), layer.kept()
                entry.bytes_held, entry.bytes_host = layer.bytes_held(), layer.bytes_host()
                if "pack" in self.parts:
                    entry.bits, entry.bits_whole = store.bits(), 8 * layer.dtype.itemsize
        return self._record


def _lengths(ids: torch.Tensor, mask: Any) -> list[int]:
    """Tokens of each prompt, without padding; empty where only embeddings were given."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape == ids.shape:
        return mask.sum(-1).tolist()
    return [ids.shape[1]] * ids.shape[0] if mask is None and ids.shape[1] else []
