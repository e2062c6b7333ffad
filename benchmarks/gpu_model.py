"""A whole model on a CUDA device: prefill and decoding under methods, beside the model alone, with random weights.

    PYTHONPATH=src python benchmarks/gpu_model.py --json FILE.json
    PYTHONPATH=src python benchmarks/gpu_model.py --only decode --lengths 131072 --batch 8 --methods quest@0.0625
    PYTHONPATH=src python benchmarks/gpu_model.py --device cpu --tiny          # the same code in seconds

The shape is that of Llama-3-8B, bfloat16, weights drawn on the device. What time depends on is the shape, and for
methods that choose also how scattered the choice is: random weights scatter it more than a trained model would.
`full` is the model without the library (transformers and SDPA; cuDNN first in the prefill); `full:attached` is the
library's own dense.

prefill: seconds of `model(ids, logits_to_keep=1)`; `attention` are the seconds of them between the queries' arrival and
the output (choosing included, projections and storing not), by CUDA events. The fastest dense is timed on a layer's own
q, k, v: FlashAttention-3 if its wheel is there, cuDNN by SDPA, and what `full` did.

decode: one sequence is prefilled by the method, then repeated over the batch with the cache's own
`batch_repeat_interleave`. `eager` is the step as shipped, `replayed` that of `attach(graph_tokens=...)`, captures
included. `graph` is a CUDA graph of a step that overwrites the last token in place:
what the step costs with a cache that neither copies itself to grow nor asks the host; `frozen` is that step without the
graph. Fewer layers than the model's 32 where memory or time ask for it: each row says how many, and `of32` is the step
with the part per layer scaled (embedding and output head measured apart). `peak` is of the eager steps, weights
included; `cache` what is held after them; `waits` are the places where an eager step waits for the device.

Gates of duo-attention, channels of double-sparsity and scores of razor-attention are drawn at random. The captured step
of recycled-attention is a cheap one; a round of eager steps holds one that reads everything.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import saccade
from saccade.attach import replay
from saccade.attach.compat import CACHE
from saccade.attach.fingerprint import fingerprint
from saccade.attach.layer import SaccadeLayer
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.method import Method
from saccade.measure.bytes import cache_bytes
from saccade.measure.contestants import parse
from saccade.measure.environment import environment

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
}  # fmt: skip
SDPA = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PLAIN = ("full", "full:attached")
STEPS = ("eager", "replayed", "graph")


@dataclass(frozen=True)
class Plan:
    """What is measured unless asked otherwise: lengths -> layers, methods with budgets."""

    prefill: dict[int, int]
    prefill_methods: tuple[str, ...]
    decode: dict[int, int]
    decode_methods: tuple[str, ...]


DUO = "duo-attention:sink_tokens=64,recent_tokens=256@0.5"
# An eighth of the layers, or of the steps of a round, read everything; the others 1/32 of the cache.
FAMILY = ("quest:dense_layers=0@1/16", "tidaldecode:dense_layers=0,reselect_layer=none,group=sum@0.152",
          "recycled-attention:every_tokens=8@0.152", "razor-attention@0.25", "zipvl@0.6")  # fmt: skip
USUAL = Plan(
    {8192: 32, 32768: 32, 131072: 32, 524288: 2},
    ("full", "full:attached", "minference@7096tok", "hip@784tok"),
    {16384: 32, 32768: 32, 131072: 8},
    ("full", "full:attached", "snapkv@0.12", DUO, "double-sparsity:dense_layers=0@1/16",
     "double-sparsity:dense_layers=0,group=max@1/16", *FAMILY),
)
SMALL = Plan(
    {256: 4, 512: 2},
    ("full", "full:attached", "minference@0.25", "hip@64tok"),
    {256: 4, 512: 2},
    ("full", "full:attached", "snapkv@0.125", "duo-attention:sink_tokens=4,recent_tokens=12@0.5",
     "double-sparsity:dense_layers=0,channels=4@1/16", "double-sparsity:dense_layers=0,channels=4,group=max@1/16",
     *FAMILY),
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """At least so many times less (or more tokens) than dense; for "cache", at most that share of its bytes."""

    part: str
    method: str
    tokens: int
    figure: str
    value: float
    batch: int = 1


GOALS = (
    Goal("prefill", "minference", 131072, "attention", 3),
    Goal("prefill", "minference", 524288, "attention", 7),
    Goal("prefill", "hip", 131072, "attention", 3),
    Goal("decode", "double-sparsity", 131072, "step", 1.9, 8),
    Goal("decode", "double-sparsity by group", 131072, "step", 1.9, 8),
    Goal("decode", "quest", 131072, "step", 1.9, 8),
    Goal("decode", "tidaldecode", 131072, "step", 2, 8),
    Goal("decode", "recycled-attention", 131072, "step", 2, 8),
    Goal("decode", "razor-attention", 131072, "step", 2, 8),
    Goal("decode", "razor-attention", 131072, "cache", 0.3, 8),
    Goal("decode", "zipvl", 131072, "step", 1.5, 8),
    Goal("decode", "zipvl", 131072, "cache", 0.3, 8),
    Goal("decode", "duo-attention", 131072, "step", 2, 1),
    Goal("decode", "duo-attention", 131072, "step", 2, 8),
    Goal("decode", "duo-attention", 131072, "cache", 1 / 2, 8),
    Goal("decode", "snapkv", 16384, "step", 3, 8),
    Goal("decode", "snapkv", 16384, "cache", 1 / 8, 8),
)


@dataclass
class Row:
    """One method at one length. Lists are of rounds; seconds, and bytes."""

    part: str
    method: str
    budget: str
    tokens: int
    batch: int
    layers: int
    figures: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)  # of one prefill or step: milliseconds by class
    waits: dict[str, int] = field(default_factory=dict)  # of one step: where, and how often
    notes: dict[str, str] = field(default_factory=dict)
    against: dict[str, float] = field(default_factory=dict)  # times less than the fastest dense; shares of bytes
    goals: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, int, int, int]:
        """What rows that are compared have in common."""
        return self.part, self.tokens, self.batch, self.layers

    def median(self, figure: str) -> float:
        """Of the rounds; infinite if there were none."""
        return statistics.median(self.figures.get(figure) or [math.inf])


# --- time -----------------------------------------------------------------------------------------------------------


class Meter:
    """Sums the time of some calls, by events on a CUDA device."""

    def __init__(self, device: str):
        self.device, self.on = device, False
        self.pairs: list[tuple[Any, Any]] = []
        self.last: tuple[Any, ...] = ()  # arguments of the last call

    def mark(self) -> Any:
        """A moment, on the device."""
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds; the device must be done."""
        return end - start if self.device == "cpu" else start.elapsed_time(end) / 1000

    def wrap(self, function: Callable) -> Callable:
        """The same function, timed while this meter is on."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            start = self.mark()
            out = function(*args, **kwargs)
            self.pairs.append((start, self.mark()))
            self.last = args
            return out

        return timed

    def during(self, work: Callable[[], Any]) -> tuple[float, float, Any]:
        """Seconds of the work, seconds of the wrapped calls in it, and its result."""
        self.pairs, self.on = [], True
        try:
            start = clock(self.device)
            out = work()
            whole = clock(self.device) - start
        finally:
            self.on = False
        return whole, sum(self.between(*pair) for pair in self.pairs), out


def clock(device: str) -> float:
    """Now, when the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


CLASSES = {
    "attention": ("flash", "fmha", "_split", "combine", "over_keys", "_forward", "attn", "sdpa", "_gathered",
                  "softmax"),
    "matrix products": ("gemm", "nvjet", "cutlass", "gemv", "splitk", "matmul", "cublas"),
    "growing the cache": ("CatArray",),
    "choosing": ("topk", "sort", "radix", "select", "column_scores", "scan", "index", "gather", "scatter",
                 "_choose", "_sample", "_sieve", "_finish"),
}  # fmt: skip  # the first class that fits


def kernels(work: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds on the device of a call, by class, and of its ten longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    what = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[what]) as seen:
        work()
        clock(device)
    spent: dict[str, float] = {}
    single: dict[str, float] = {}
    for event in seen.key_averages():
        took = (event.self_cpu_time_total if device == "cpu" else event.self_device_time_total) / 1000
        name = next((c for c, words in CLASSES.items() if any(w.lower() in event.key.lower() for w in words)), "other")
        spent[name] = spent.get(name, 0.0) + took
        single[f"{event.key[:60]} x{event.count}"] = took
    longest = sorted(single.items(), key=lambda pair: -pair[1])[:10]
    return {"all": sum(spent.values()), **spent, **{f"kernel {name}": took for name, took in longest}}


# --- the model and who works in it -----------------------------------------------------------------------------------


def random_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Weights as at the start of a training, made where they stay."""
    shape = TINY if args.tiny else LLAMA
    config = LlamaConfig(
        **shape, max_position_embeddings=2**20, tie_word_embeddings=False, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(rng.seed_of("benchmarks/gpu_model"))
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32 if args.tiny else torch.bfloat16)
    model.every_layer = list(model.model.layers)
    return model.eval()


def cut(model: LlamaForCausalLM, layers: int) -> None:
    """Work with the first layers only."""
    model.model.layers = nn.ModuleList(model.every_layer[:layers])
    model.config.num_hidden_layers = len(model.model.layers)


@dataclass(frozen=True)
class Contestant:
    """Who works in the model: `method` None is the model alone."""

    label: str
    method: Method | None
    budget: Budget

    @classmethod
    def of(cls, text: str) -> Contestant:
        """Read NAME:OPTION=VALUE,...@BUDGET; a budget may be a fraction such as 1/16."""
        name, _, budget = text.partition("@")
        budget = str(float(Fraction(budget))) if "/" in budget else budget or "1"
        if name in PLAIN:
            return cls(name, saccade.get("full")() if name == PLAIN[1] else None, Budget.of(1.0))
        (method,) = parse(name).methods
        label = method.card.name + (" by group" if "group=max" in name else "")  # lists that its heads share
        return cls(label, method, Budget.of(budget))


def equipped(model: LlamaForCausalLM, method: Method) -> Method:
    """With an artefact made by hand, where it lives by one."""
    if method.card.name not in DRAWN:
        return method
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    tensors = DRAWN[method.card.name](*shape)
    mark = fingerprint(model)
    artefact = Artefact(method.card.name, tensors, "random weights", mark, data="drawn at random")
    return dataclasses.replace(method, artefact=artefact)




def drawn_gates(layers: int, heads: int, size: int) -> dict[str, Tensor]:
    """Of duo-attention: in no order, so that the half of highest gate lies anywhere in the model."""
    return {"gates": torch.rand(layers, heads, generator=rng.generator("benchmarks/gpu_model/gates"))}


def drawn_channels(layers: int, heads: int, size: int) -> dict[str, Tensor]:
    """Of double-sparsity: each head has an order of its own."""
    noise = torch.rand(layers, heads, size, generator=rng.generator("benchmarks/gpu_model/channels"))
    return dict.fromkeys(("q", "k", "qk"), noise.argsort(-1).to(torch.int16))


def drawn_scores(layers: int, heads: int, size: int) -> dict[str, Tensor]:
    """Of razor-attention: the whole heads lie anywhere."""
    noise = torch.rand(2, layers, heads, generator=rng.generator("benchmarks/gpu_model/scores"))
    return {"induction": noise[0], "echo": noise[1]}


DRAWN = {"duo-attention": drawn_gates, "double-sparsity": drawn_channels, "razor-attention": drawn_scores}


@contextlib.contextmanager
def working(model: LlamaForCausalLM, who: Contestant, meter: Meter) -> Iterator[Any]:
    """Attach for as long as the block lasts, attention metered; gives the run, None for the model alone."""
    if who.method is None:
        plain = AttentionInterface()["sdpa"]
        AttentionInterface.register("sdpa", meter.wrap(functools.partial(unmasked, plain)))
        try:
            yield None
        finally:
            AttentionInterface.register("sdpa", plain)
        return
    with saccade.attach(model, equipped(model, who.method), budget=who.budget) as run:
        for engine in run._engines.values():
            engine.attend = meter.wrap(engine.attend)
        yield run


def unmasked(plain: Callable, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    """SDPA as transformers calls it. While a graph is captured some versions make a mask that hides nothing, and take
    another kernel for it.
    """
    if q.shape[2] == 1:
        return plain(module, q, k, v, None, **options)
    with sdpa_kernel(SDPA, set_priority=True):
        return plain(module, q, k, v, mask, **options)


def tokens_of(model: LlamaForCausalLM, batch: int, tokens: int) -> Tensor:
    """Random ids."""
    device = model.lm_head.weight.device
    draw = rng.generator("benchmarks/gpu_model/ids", 0, batch, tokens, device=device)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=draw, device=device)


# --- prefill ---------------------------------------------------------------------------------------------------------


def prefill_rows(model: LlamaForCausalLM, args: argparse.Namespace, tokens: int, layers: int) -> list[Row]:
    """All methods at one length, round by round, and the dense kernels beside them."""
    cut(model, layers)
    field = [Contestant.of(text) for text in args.methods or args.plan.prefill_methods]
    rows = [Row("prefill", who.label, str(who.budget), tokens, 1, layers) for who in field]
    ids, spent, own = tokens_of(model, 1, tokens), [0.0] * len(field), ()
    for number in range(-1, args.rounds):  # the first is the warm-up
        for i, who in enumerate(field):
            row = rows[i]
            if "error" in row.notes or (row.figures and spent[i] > args.most_seconds):
                continue
            with noting(row, "error"):
                meter = Meter(args.device)
                whole, attention = one_prefill(model, who, meter, ids if number >= 0 else ids[:, : warm(tokens)])
                spent[i] += whole
                own = meter.last[1:4] if who.method is None else own
                del meter
                if number >= 0:
                    row.figures.setdefault("seconds", []).append(whole)
                    row.figures.setdefault("attention", []).append(attention)
            tidy(args.device)
    for row, who in zip(rows, field):
        if row.figures and not args.no_profile and row.median("seconds") < args.profile_seconds:
            with noting(row, "profile"):
                work = functools.partial(one_prefill, model, who, Meter(args.device), ids)
                row.kernels = kernels(work, args.device)
                del work
            tidy(args.device)
    return [*rows, dense_row(args, own, layers)] if own else rows


def warm(tokens: int) -> int:
    """Compiles what a longer prompt needs, in less time."""
    return min(tokens, 16384)


@torch.no_grad()
def one_prefill(model: LlamaForCausalLM, who: Contestant, meter: Meter, ids: Tensor) -> tuple[float, float]:
    """Seconds, and those of attention."""
    with working(model, who, meter):
        return meter.during(lambda: model(ids, use_cache=True, logits_to_keep=1))[:2]


def dense_row(args: argparse.Namespace, own: tuple[Tensor, ...], layers: int) -> Row:
    """Dense kernels on the last layer's q, k, v: seconds of one layer, times the layers."""
    q, k, v = own
    row, meter = Row("prefill", "dense kernels", "1", q.shape[2], 1, layers), Meter(args.device)
    for name, kernel in dense_kernels(args.device).items():
        with noting(row, name), torch.no_grad():
            kernel(q[:, :, :256], k[:, :, :256], v[:, :, :256])
            work = meter.wrap(functools.partial(kernel, q, k, v))
            row.figures[name] = [layers * meter.during(work)[1] for _ in range(args.rounds)]
    return row


def dense_kernels(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What there is: cuDNN by SDPA, and FlashAttention-3."""

    def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA, set_priority=True):
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    found = {"cudnn" if device != "cpu" else "sdpa": by_sdpa}
    if device != "cpu" and importlib.util.find_spec("fa3_fwd_interface") is not None:
        import fa3_fwd_interface

        def by_fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fa3_fwd_interface.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)

        found["fa3"] = by_fa3
    return found


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_rows(model: LlamaForCausalLM, args: argparse.Namespace, tokens: int, layers: int) -> list[Row]:
    """All methods at one length, batches ascending."""
    cut(model, layers)
    rows = []
    for text in args.methods or args.plan.decode_methods:
        who = Contestant.of(text)
        some = [Row("decode", who.label, str(who.budget), tokens, batch, layers) for batch in sorted(args.batch)]
        with noting(some[0], "error"):
            decode_with(model, who, args, some)
        rows += some
        tidy(args.device)
    return rows


@torch.no_grad()
def decode_with(model: LlamaForCausalLM, who: Contestant, args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """One prompt, then each batch."""
    meter = Meter(args.device)
    with working(model, who, meter) as run:
        cache = model(tokens_of(model, 1, rows[0].tokens), use_cache=True, logits_to_keep=1)[CACHE]
        there = 1
        for row in rows:
            with noting(row, "error"):
                cache.batch_repeat_interleave(row.batch // there)
                there = row.batch
                tidy(args.device)
                eager(model, cache, args, row, meter)
                frozen(model, run, cache, args, row)
                if run is not None and args.device != "cpu":
                    replayed(model, run, cache, args, row)
                scale(row)
            if "error" in row.notes:
                return


def eager(model: LlamaForCausalLM, cache: Any, args: argparse.Namespace, row: Row, meter: Meter) -> None:
    """Steps as anybody takes them."""
    token = tokens_of(model, row.batch, 1)

    def steps(many: int = args.steps) -> None:
        for _ in range(many):
            model(token, **{CACHE: cache}, use_cache=True)

    steps(2)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.rounds):
        start = clock(args.device)
        steps()
        row.figures.setdefault("eager", []).append((clock(args.device) - start) / args.steps)
    row.bytes["cache"] = cache_bytes(cache)
    if args.device != "cpu":
        row.bytes["peak"] = torch.cuda.max_memory_allocated()
    row.figures["eager attention"] = [meter.during(functools.partial(steps, 1))[1] for _ in range(args.rounds)]
    if not args.no_profile:
        row.kernels = kernels(functools.partial(steps, 1), args.device)
    row.waits = waits(functools.partial(steps, 1), args.device)


def waits(work: Callable[[], object], device: str) -> dict[str, int]:
    """Where the host waits for the device."""
    if device == "cpu":
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]
    return {place: places.count(place) for place in dict.fromkeys(places)}


def frozen(model: LlamaForCausalLM, run: Any, cache: Any, args: argparse.Namespace, row: Row) -> None:
    """A step over a cache that stays as long as it is: without a graph and in one."""
    place = torch.full((row.batch, 1), row.tokens, device=args.device)
    token = tokens_of(model, row.batch, 1)

    def step() -> Tensor:
        return model(token, position_ids=place, **{CACHE: cache}, use_cache=True).logits

    with held_still(run, cache):
        with noting(row, "frozen"):
            step()
            for _ in range(args.rounds):
                start = clock(args.device)
                for _ in range(args.steps):
                    step()
                row.figures.setdefault("frozen", []).append((clock(args.device) - start) / args.steps)
        if args.device == "cpu":
            row.notes["graph"] = "there are no graphs on a CPU"
            return
        with noting(row, "graph"):
            row.figures["graph"] = replays(step, args)
        if "graph" in row.figures:
            rest = replays(lambda: model.lm_head(model.model.norm(model.model.embed_tokens(token))), args)
            row.figures["rest"] = rest


def scale(row: Row) -> None:
    """What 32 layers would take, where fewer were run."""
    for name in STEPS if "rest" in row.figures else ():
        outside, share = row.median("rest"), LLAMA["num_hidden_layers"] / row.layers
        if name in row.figures:
            row.figures[f"{name} of32"] = [outside + share * (t - outside) for t in row.figures[name]]


def replayed(model: LlamaForCausalLM, run: Any, cache: Any, args: argparse.Namespace, row: Row) -> None:
    """Steps as anybody takes them who attaches with graph_tokens."""
    token = tokens_of(model, row.batch, 1)

    def steps(many: int) -> None:
        for _ in range(many):
            model(token, **{CACHE: cache}, use_cache=True)

    with noting(row, "replayed"):
        model.forward = replay.Replayer(run, type(model).forward.__get__(model), args.graph_tokens)
        steps(2)
        for _ in range(args.rounds):
            start = clock(args.device)
            steps(args.graph_tokens)  # one capture, wherever it falls
            row.figures.setdefault("replayed", []).append((clock(args.device) - start) / args.graph_tokens)
    model.__dict__.pop("forward", None)


def replays(step: Callable[[], object], args: argparse.Namespace) -> list[float]:
    """Seconds of a step as a CUDA graph, of each round."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out = []
    for _ in range(args.rounds + 1):
        start = clock(args.device)
        for _ in range(args.steps):
            graph.replay()
        out.append((clock(args.device) - start) / args.steps)
    return out[1:]


@contextlib.contextmanager
def held_still(run: Any, cache: Any) -> Iterator[None]:
    """New keys and values overwrite the last ones in place, and nothing is evicted, so that each step is the same.

    A rolling eviction has left what the next query sees and one more: all of that is visible.
    """
    if run is None:
        for layer in cache.layers:
            layer.update = functools.partial(overwrite_layer, layer)
    else:
        for engine in run._engines.values():
            engine.evict, engine._visible = (lambda *_, **__: None), (lambda *_, **__: None)
        for layer in cache.layers:
            assert isinstance(layer, SaccadeLayer) and layer.store is not None
            layer.store.append = functools.partial(overwrite_store, layer.store)
            whole = {id(bucket): layer.store.whole_sequences(bucket) for bucket in layer.store.buckets}
            layer.store.whole_sequences = lambda bucket, whole=whole: whole[id(bucket)]
    try:
        yield
    finally:
        for layer in cache.layers:
            if run is None:
                del layer.update
            else:
                del layer.store.append, layer.store.whole_sequences
        for engine in run._engines.values() if run is not None else ():
            del engine.evict, engine._visible


def overwrite_layer(layer: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """In place of a growing layer's `update`."""
    layer.keys[:, :, -1:].copy_(keys)
    layer.values[:, :, -1:].copy_(values)
    return layer.keys, layer.values


def overwrite_store(store: Any, columns: dict[str, Tensor], real: Tensor | None) -> None:
    """In place of a store's `append`."""
    assert real is None
    for bucket in store.buckets:
        for name, column in columns.items():
            new = column.flatten(0, 1)
            if len(bucket.rows) < len(new):
                new = new.index_select(0, bucket.rows)
            bucket.columns[name][:, -1:].copy_(new)


# --- what comes of it ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noting(row: Row, name: str) -> Iterator[None]:
    """What one of them raises is a note in its row; the others go on."""
    try:
        yield
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)
        ours = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in at if "/saccade/" in f.filename][-2:]
        text = str(error).strip().split("\n")[0][:160]
        row.notes[name] = f"{type(error).__name__}: {text} ({' '.join(ours)})"


def tidy(device: str) -> None:
    """Give memory back."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


FASTEST = {
    "prefill": {"seconds": ("seconds",), "attention": ("attention", "cudnn", "fa3", "sdpa")},
    "decode": {"eager": ("eager",), "frozen": ("frozen",), "graph": ("graph",), "replayed": ("replayed", "eager"),
               **{f"{name} of32": (f"{name} of32",) for name in STEPS}},
}  # fmt: skip


def judge(rows: list[Row]) -> None:
    """Against the fastest dense of the same length and batch, and against the goals."""
    for row in rows:
        dense = [r for r in rows if r.place == row.place and r.method in (*PLAIN, "dense kernels")]
        for figure, names in FASTEST[row.part].items():
            best = min((r.median(name) for r in dense for name in names), default=math.inf)
            if math.isfinite(best) and figure in row.figures:
                row.against[figure] = best / row.median(figure)
        for name in row.bytes:
            whole = [r.bytes[name] for r in dense if name in r.bytes and r.method in PLAIN]
            if whole:
                row.against[name] = row.bytes[name] / min(whole)
        for goal in GOALS:
            if (goal.part, goal.method, goal.tokens, goal.batch) == (row.part, row.method, row.tokens, row.batch):
                names = [n for n in ("eager", "frozen", "graph", "replayed") if n in row.against]
                names = names if goal.figure == "step" else [goal.figure] if goal.figure in row.against else []
                reached = ", ".join(f"{n} {row.against[n]:.2f}" for n in names) or "nothing measured"
                sign = "<=" if goal.figure == "cache" else ">="
                row.goals[goal.figure] = f"{sign} {goal.value:g}: {reached}"


def crossovers(rows: list[Row]) -> list[dict[str, Any]]:
    """From which length on a method takes less than the fastest dense: on a line between lengths, both logarithmic."""
    out = []
    groups = {(r.part, r.method, r.batch, figure) for r in rows for figure in r.against if figure in FASTEST[r.part]}
    for part, method, batch, figure in sorted(groups - {g for g in groups if g[1] in PLAIN}):
        points = sorted(
            (r.tokens, r.against[figure]) for r in rows
            if (r.part, r.method, r.batch) == (part, method, batch) and figure in r.against
        )  # fmt: skip
        out.append({"part": part, "method": method, "batch": batch, "figure": figure, "points": points,
                    "crossover_tokens": crossing(points)})  # fmt: skip
    return out


def crossing(points: list[tuple[int, float]]) -> float | str:
    """Where the speed-up passes 1."""
    if points[0][1] >= 1:
        return f"below {points[0][0]}"
    for (n0, s0), (n1, s1) in itertools.pairwise(points):
        if s0 < 1 <= s1:
            at = -math.log(s0) / (math.log(s1) - math.log(s0))
            return round(math.exp(math.log(n0) + at * (math.log(n1) - math.log(n0))))
    return f"above {points[-1][0]}"


def line(row: Row) -> str:
    """For people."""
    text = f"{row.part} {row.tokens:>7} x{row.batch} {row.layers:>2} layers  {row.method} {row.budget}".ljust(58)
    for name, times in row.figures.items():
        if times and name not in ("rest",):
            text += f" | {name} {1000 * row.median(name):.2f} ms ({1000 * min(times):.2f}-{1000 * max(times):.2f})"
            text += f" {row.batch / row.median(name):.0f} tok/s" if name in (*STEPS, "graph of32") else ""
            text += f" x{row.against[name]:.2f}" if name in row.against else ""
    for name, size in row.bytes.items():
        text += f" | {name} {size / 2**30:.2f} GiB" + (f" ({row.against[name]:.3f})" if name in row.against else "")
    text += f" | waits {sum(row.waits.values())}" if row.waits else ""
    for name in ("goals", "notes"):
        text += "".join(f" | {name[:-1]} {key} {value}" for key, value in getattr(row, name).items())
    return text


def profile_text(rows: Sequence[Row]) -> str:
    """Milliseconds on the device by class, then the longest kernels."""
    out = []
    for row in rows:
        if row.kernels:
            out.append(f"{row.part} {row.tokens} x{row.batch}, {row.layers} layers, {row.method} {row.budget}, eager")
            out += [f"  {took:10.3f} ms  {name}" for name, took in row.kernels.items()]
            out += [f"  {count:10} waits at {place}" for place, count in row.waits.items()]
    return "\n".join(out) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["prefill", "decode"])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="each a multiple of the one before it")
    parser.add_argument("--methods", nargs="+", help="NAME:OPTION=VALUE,...@BUDGET, 'full', 'full:attached'")
    parser.add_argument("--layers", type=int, help="for all lengths; else each has its own number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="tokens decoded in a round")
    parser.add_argument("--graph-tokens", type=int, default=128, help="of `replayed`: tokens between captures")
    parser.add_argument("--most-seconds", type=float, default=40, help="no further round of a prefill after these")
    parser.add_argument("--profile-seconds", type=float, default=3, help="prefills that take longer are not profiled")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape in float32")
    parser.add_argument("--json", help="write everything there")
    parser.add_argument("--profile", help="write the profiles there, as text")
    args = parser.parse_args()
    args.plan = SMALL if args.tiny else USUAL
    return args


def main() -> int:
    args = arguments()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none.", file=sys.stderr)
        return 3
    start, rows = time.perf_counter(), []
    model = random_model(args)
    print(f"model made in {time.perf_counter() - start:.0f} s", flush=True)
    for part, work in (("prefill", prefill_rows), ("decode", decode_rows)):
        usual = getattr(args.plan, part)
        for tokens in (args.lengths or usual) if args.only in (None, part) else ():
            layers = args.layers or usual.get(tokens, max(usual.values()))
            some = work(model, args, tokens, layers)
            judge(some)
            print("\n".join(map(line, some)), f"[{time.perf_counter() - start:.0f} s]", sep="\n", flush=True)
            rows += some
            write(args, rows)
            tidy(args.device)
    return 0


def write(args: argparse.Namespace, rows: list[Row]) -> None:
    """All so far: a run that is stopped has left what it measured."""
    crossed = crossovers(rows)
    if args.json:
        what = {"environment": environment(args.device), "shape": TINY if args.tiny else LLAMA, "rounds": args.rounds}
        with open(args.json, "w") as file:
            json.dump(what | {"crossovers": crossed, "rows": [dataclasses.asdict(r) for r in rows]}, file, indent=1)
    if args.profile:
        with open(args.profile, "w") as file:
            file.write(profile_text(rows))


if __name__ == "__main__":
    sys.exit(main())
