"""Decoding steps as CUDA graphs: the host launches one graph where it would launch some dozens of kernels a layer.

A step of one token over the same cache is captured once and replayed for the next tokens, which go into a tail beside
what is stored (`attach/tail.py`). When the tail is full, its tokens are stored, methods bring up to date what they
remember, and the next step is captured anew.
"""

from __future__ import annotations

import functools
import inspect
import operator
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.attach import compat
from saccade.attach.layer import SaccadeLayer
from saccade.attach.tail import Clock, Tail
from saccade.core.errors import CannotRun
from saccade.core.method import Cache, Method

if TYPE_CHECKING:
    from saccade.attach.run import Run

WORTH = 8  # replays that a capture must serve in the mean, or its user is told
INPUTS = ("input_ids", "inputs_embeds", "position_ids")


def why_not(model: nn.Module, parts: dict[str, Method], tokens: int, shared: bool) -> list[str]:
    """Every reason why steps of these methods cannot be replayed, so many tokens from one capture, in a model that may
    be shared among processes; [] means that they can."""
    reasons, where = [], devices(model)
    if tokens < 1:
        reasons.append("a graph serves one token or more")
    if shared:
        reasons.append("processes share this model or its texts, and wait for each other in every layer")
    if len(where) > 1 or not where[0].startswith("cuda"):
        reasons.append(f"its weights are on {', '.join(where)}, and graphs are of one CUDA device")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        reasons.append(f"{type(model).__name__}.forward takes no position_ids")
    if "observe" in parts:
        reasons.append(f"{parts['observe'].card.name} looks on at every step")
    reader, evictor = parts.get("decode"), parts.get("evict")
    if reader is not None and not (reader.replays and not getattr(reader, "reread_tokens", 0)):
        reasons.append(f"{reader.card.name} does not do the same in every step, or asks the host")
    if isinstance(evictor, Cache) and (evictor.weighing or evictor.tallies):
        reasons.append(f"{evictor.card.name} decides after every token what goes")
    return reasons


def devices(model: nn.Module) -> list[str]:
    """Where its weights are."""
    return sorted({str(p.device) for p in model.parameters()})


def ours(cache: Any) -> list[SaccadeLayer]:
    """The layers of a cache that an engine works on."""
    return [layer for layer in cache.layers if isinstance(layer, SaccadeLayer)]


@dataclass
class Step:
    """One forward of one token of each sequence."""

    cache: Any
    inputs: dict[str, Tensor]  # what changes from step to step
    options: dict[str, Any]  # what may not

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a captured step must have in common with it."""
        shapes = tuple((name, x.shape, x.dtype) for name, x in self.inputs.items())
        return shapes, repr(sorted(self.options.items())), torch.is_inference_mode_enabled()

    @property
    def layers(self) -> list[SaccadeLayer]:
        """Those of the cache that are ours."""
        return ours(self.cache)


class Graph:
    """Work on a CUDA device, to be done again. `warm`: do it once before, so that all its kernels are loaded."""

    def __init__(self, work: Callable[[], Any], warm: bool):
        if warm:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = work()

    def replay(self) -> Any:
        """The result lies where that of the last replay lay."""
        self._graph.replay()
        return self._out


class Replayer:
    """In the place of a model's forward."""

    graph: Callable[[Callable[[], Any], bool], Any] = Graph

    def __init__(self, run: Run, original: Callable, tokens: int):
        self.run, self.original, self.tokens = run, original, tokens
        self.signature = inspect.signature(original)
        self.captures = self.replays = 0
        functools.update_wrapper(self, original, updated=())
        self._said: set[str] = set()
        self._kinds: set[tuple[Any, ...]] = set()  # captured at some time, so that all its kernels are there
        self._drop()

    def _drop(self) -> None:
        self._graph: Any = None
        self._tails: list[Tail] = []
        self._last: tuple[weakref.ref, tuple] | None = None  # cache and kind of the last step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; a step like the one before it is captured, and replayed from then on."""
        step = self._step(args, kwargs)
        if step is None:
            self._drop()
            return self.original(*args, **kwargs)
        if self._follows(step):
            if not self._fits(step):
                self._capture(step)
            return self._replay(step)
        self._drop()
        out = self.original(*args, **kwargs)
        self._last = weakref.ref(step.cache), step.kind
        return out

    # --- what can be replayed -----------------------------------------------------------------------------------------

    def _step(self, args: tuple, kwargs: dict[str, Any]) -> Step | None:
        """None: it is a prompt, several tokens, or training, and computed as ever.

        Raises:
            CannotRun: a step that is given what no graph could be.
        """
        given = self.signature.bind(*args, **kwargs)
        named = {name: x for name, x in given.arguments.items() if name not in ("args", "kwargs")}
        named = {name: x for name, x in (named | given.arguments.get("kwargs", {})).items() if x is not None}
        cache = next((named.pop(name) for name in compat.CACHES if name in named), None)
        inputs = {name: named.pop(name) for name in INPUTS if name in named}
        first = next(iter(inputs.values()), None)
        if cache is None or first is None or first.shape[1] != 1 or not self._is_ours(cache):
            return None
        if torch.is_grad_enabled():
            self._say("steps that keep gradients are computed as ever: call the model under torch.no_grad()")
            return None
        mask, _ = named.pop("attention_mask", None), named.pop("cache_position", None)
        self._check(cache, inputs, mask, named)
        inputs.setdefault("position_ids", torch.full(first.shape[:2], cache.get_seq_length(), device=first.device))
        return Step(cache, inputs, named)

    def _is_ours(self, cache: Any) -> bool:
        layers = ours(cache)
        ready = all(layer.prompt_done and not layer.recording and layer.engine.run is self.run for layer in layers)
        return bool(layers) and ready and not self.run.more_prompt and not self.run.note_reads

    def _check(self, cache: Any, inputs: dict[str, Tensor], mask: Any, rest: dict[str, Any]) -> None:
        kinds = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, SaccadeLayer)}
        reasons = [f"its cache has a {kind}, which moves in every step" for kind in sorted(kinds)]
        reasons += [f"it was given {name}" for name, x in rest.items() if isinstance(x, Tensor)]
        reasons += ["its result is to be a tuple"] * (rest.get("return_dict") is False)
        if mask is not None and not (mask.dim() == 2 and bool(mask[:, -1].all())):
            reasons.append("a sequence gets no token in this step")
        if "position_ids" not in inputs and not self._counts_positions(mask):
            reasons.append("it was given no position_ids, which are more than the cache's length here")
        if reasons:
            raise CannotRun(f"replay a step of {self.run.title}", reasons, "Attach with graph_tokens=0.")

    def _counts_positions(self, mask: Tensor | None) -> bool:
        """Whether a token's position is the number of those before it: in a text without padding."""
        config = self.run.model.config
        return config.get_text_config(decoder=True) is config and (mask is None or bool(mask.all()))

    def _follows(self, step: Step) -> bool:
        """Whether the last step was one like this."""
        return self._last is not None and self._last[0]() is step.cache and self._last[1] == step.kind

    def _fits(self, step: Step) -> bool:
        """Whether nobody has touched the tails of the graph at hand, and they have room."""
        there = [layer.tail for layer in step.layers]
        same = len(there) == len(self._tails) and all(map(operator.is_, there, self._tails))
        return same and self._tails[0].count < self.tokens

    # --- a graph ------------------------------------------------------------------------------------------------------

    def _capture(self, step: Step) -> None:
        self._graph = None  # the memory is free before the next graph takes some
        device = step.layers[0].store.buckets[0].rows.device
        self._clock = Clock.of(self.tokens, device)
        self._tails = [Tail.beside(layer.engine, layer, self.tokens, self._clock) for layer in step.layers]
        self._inputs = {name: x.clone() for name, x in step.inputs.items()}
        self._clock.set(0)
        self._graph = self._made(functools.partial(self._work, step), step.kind not in self._kinds)
        self._kinds.add(step.kind)
        for layer, tail in zip(step.layers, self._tails):
            layer.tail = tail
            tail.pairs.zero_()
            tail.visited.zero_()
        self.captures += 1
        self._judge()

    def _made(self, work: Callable[[], Any], warm: bool) -> Any:
        """A graph; the lengths of a later one may ask for a kernel that is not loaded yet.

        Raises:
            CannotRun: what these methods do cannot be captured.
        """
        try:
            return self.graph(work, warm)
        except RuntimeError as error:
            if not warm:
                return self._made(work, True)
            found = str(error).strip().split("\n")[0]
            raise CannotRun(f"capture a step of {self.run.title}", found, "Attach with graph_tokens=0.") from error

    def _work(self, step: Step) -> tuple[type, dict[str, Any]]:
        """The step that is captured: kind and parts of its result. What it leaves on the host is undone, since it was
        no step yet."""
        before = [(layer.seen, layer.tail) for layer in step.layers]
        for layer, tail in zip(step.layers, self._tails):
            layer.tail, tail.live = tail, True
        try:
            out = self.original(**self._inputs, **{compat.CACHE: step.cache}, **step.options)
        finally:
            for layer, tail, (seen, there) in zip(step.layers, self._tails, before):
                layer.seen, layer.tail, tail.live = seen, there, False
        return type(out), {name: x for name, x in out.items() if x is not step.cache}

    def _replay(self, step: Step) -> Any:
        for name, x in step.inputs.items():
            self._inputs[name].copy_(x)
        self._clock.set(self._tails[0].count)
        kind, parts = self._graph.replay()
        for layer, tail in zip(step.layers, self._tails):
            tail.count += 1
            layer.seen += 1
        self.replays += 1
        return kind(**{name: _copied(x) for name, x in parts.items()}, **{compat.CACHE: step.cache})

    def _judge(self) -> None:
        if self.captures == 2 * WORTH and self.replays < WORTH * self.captures:
            self._say(f"{self.captures} steps were captured for {self.replays} that were replayed; it does not pay")

    def _say(self, text: str) -> None:
        """Once."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(f"graph_tokens of {self.run.title}: {text}", stacklevel=5)


def _copied(x: Any) -> Any:
    """Of its own: the graph overwrites what it gave."""
    if isinstance(x, Tensor):
        return x.clone()
    return type(x)(map(_copied, x)) if isinstance(x, (tuple, list)) else x
