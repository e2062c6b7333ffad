"""What prefill, a decoding step and the cache cost on many GPUs, on paper: seconds of one GPU that were measured, cut
to the shares of a split, plus what stated links take. Torch-free.

Measured: data/scale-h200.json, which `benchmarks/scale.py` makes of stored results. Stated: `Cluster`. Not measured:
that work is cut evenly, that ways grow on as they grew from 128k to 512k tokens, and that kernels keep their speed for
models of other head counts.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.models.shapes import BYTES, Shape

MEASURED = Path(__file__).parent.parent / "data" / "scale-h200.json"
PAYS = 1.1  # times faster than dense on the same GPUs: less is not worth a method
ROOM = 0.9  # of a GPU's memory, for weights and cache; the rest is work space
MOST_GPUS, LEAST_TOKENS, MOST_TOKENS = 1024, 2**13, 2**27  # where `pays_to` and `pays_from` look
STATE_BYTES = 4  # of a number of a linear layer's state, which is kept in float32


@dataclass(frozen=True)
class Cluster:
    """GPUs and what links them: by default what NVIDIA states of HGX H200 with one 400 Gbit/s adapter a GPU (NVLink 900
    GB/s both ways together). The seconds that a collective waits per doubling of its GPUs are an assumption.
    """

    gpus: int
    node_gpus: int = 8
    memory_bytes: float = 141e9
    link: float = 450e9  # bytes a second, one way, within a node
    network: float = 50e9  # the same between nodes, of each GPU
    wait_seconds: float = 5e-6

    def splits(self, shape: Shape) -> list[Split]:
        """Every way to use all GPUs: heads over those of one node, tokens over the rest."""
        most = math.gcd(shape.heads, shape.kv_heads)
        return [Split(n, self.gpus // n) for n in range(1, min(self.node_gpus, self.gpus) + 1)
                if self.gpus % n == 0 and most % n == 0]  # fmt: skip

    def between(self, split: Split) -> float:
        """Bytes a second from one part of the tokens to the next."""
        return self.link if split.gpus <= self.node_gpus else self.network


@dataclass(frozen=True)
class Split:
    """Heads (tensor parallel) x tokens (sequence parallel)."""

    heads: int
    tokens: int

    @property
    def gpus(self) -> int:
        """All that take part."""
        return self.heads * self.tokens


@dataclass(frozen=True)
class Way:
    """A method and where it was measured. `pairs`: the row of blocks that it computes. `dense_steps`: share of the
    steps that read everything and are not in the measured one. `reach`: keys before a part of the tokens that it needs;
    None: all of them.
    """

    name: str
    family: str
    prefill: str = ""
    pairs: str = ""
    decode: str = ""
    dense_steps: float = 0.0
    reach: int | None = None


WAYS = (
    Way("full", ""),
    Way("minference", "sparse", prefill="minference"),
    Way("hip", "sparse", prefill="hip"),
    *(Way(f"blocks@{share}", "sparse", pairs=f"blocks 128 {share}") for share in ("0.05", "0.10", "0.25")),
    Way("window@4100tok", "sparse", pairs="sinks 4 + window 4096", reach=4100),
    *(Way(name, "cache", decode=name) for name in ("snapkv", "duo-attention", "razor-attention", "zipvl")),
    *(Way(name, "decode", decode=name) for name in ("quest", "double-sparsity by group", "tidaldecode")),
    Way("recycled-attention", "decode", decode="recycled-attention", dense_steps=1 / 8),
    Way("linear", "mixers", reach=0),
)
BY_NAME = {way.name: way for way in WAYS}


@functools.cache
def measured() -> dict[str, Any]:
    """The stored points."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


@functools.cache
def reference() -> Shape:
    """The model that was measured."""
    return Shape("measured", **{key: value for key, value in measured()["shape"].items() if key != "from"})


# --- work and bytes ---------------------------------------------------------------------------------------------------


def product_flops(shape: Shape, tokens: int) -> float:
    """Of the matrix products of one layer."""
    return 2.0 * tokens * shape.layer_parameters


def attention_flops(shape: Shape, tokens: int, density: float = 1.0) -> float:
    """Of one layer's causal attention, both products, at a share of its pairs."""
    return 4.0 * shape.heads * shape.head_size * tokens**2 / 2 * density


def cache_bytes(shape: Shape, way: Way, tokens: int) -> float:
    """Of all layers, all GPUs together: what the way holds beside `full`, as it was measured; of a linear layer its
    state."""
    windowed = shape.windowed * min(tokens, shape.window_tokens) * shape.kv_bytes
    if way.name == "linear":
        return windowed + (shape.layers - shape.windowed) * shape.heads * shape.head_size**2 * STATE_BYTES
    share = _longest(way.decode)[-1]["cache"] if way.decode else 1.0
    return windowed + share * (shape.layers - shape.windowed) * tokens * shape.kv_bytes


def read_bytes(shape: Shape) -> float:
    """Of the weights, which a step reads all but for the embedding."""
    return BYTES * (shape.layers * shape.layer_parameters + shape.hidden * shape.vocabulary)


def dense_work(shape: Shape, tokens: int) -> dict[str, float]:
    """Of `full`, all GPUs together: operations of a prefill, bytes that a step reads, bytes of the cache."""
    held, whole = cache_bytes(shape, BY_NAME["full"], tokens), shape.layers - shape.windowed
    window = min(1.0, 2 * shape.window_tokens / tokens)
    seen = whole * attention_flops(shape, tokens) + shape.windowed * attention_flops(shape, tokens, window)
    flops = shape.layers * product_flops(shape, tokens) + seen
    return {"prefill_flops": flops, "step_bytes": read_bytes(shape) + held, "cache_bytes": held}


def ring_bytes(shape: Shape, way: Way, tokens: int, split: Split) -> float:
    """Of one layer's keys and values that reach a GPU from the other parts of the tokens. A linear layer's state goes
    once through the parts, in as many steps as they have doublings."""
    if way.name == "linear":
        return math.log2(split.tokens) * shape.heads / split.heads * shape.head_size**2 * STATE_BYTES
    others = tokens * (split.tokens - 1) / split.tokens
    return min(others, way.reach if way.reach is not None else others) * shape.kv_bytes / split.heads


def reduce_bytes(shape: Shape, tokens: float, split: Split) -> float:
    """What a GPU sends in the two all-reduces of a layer over a node's rings."""
    return 2 * 2 * (split.heads - 1) / split.heads * tokens * shape.hidden * BYTES


# --- one GPU: what was measured ---------------------------------------------------------------------------------------


def curve(points: Sequence[dict[str, Any]], tokens: float) -> float:
    """Seconds at a length: straight between the points where both axes are logarithmic, and on as between the last two;
    before the first, in proportion."""
    if tokens <= points[0]["tokens"]:
        return points[0]["seconds"] * tokens / points[0]["tokens"]
    pairs = list(itertools.pairwise(points))
    a, b = next((pair for pair in pairs if tokens <= pair[1]["tokens"]), pairs[-1])
    power = math.log(b["seconds"] / a["seconds"]) / math.log(b["tokens"] / a["tokens"])
    return a["seconds"] * (tokens / a["tokens"]) ** power


def attention_seconds(shape: Shape, way: Way, tokens: int) -> float:
    """Of one layer's prefill on one GPU, choosing included; not of layers with a window of their own."""
    known = measured()
    size = shape.heads * shape.head_size / (reference().heads * reference().head_size)
    if way.name == "linear":
        return size * curve(known["linear"], tokens)
    if not way.pairs:
        return size * curve(known["prefill"][way.prefill or "full"], tokens)
    row = next(row for row in known["blocks"] if row["case"] == way.pairs)
    if way.reach is not None:
        return windowed_seconds(shape, tokens, way.reach, row["flops"])
    return attention_flops(shape, tokens, row["density"]) / row["flops"] + size * choosing_seconds(tokens)


def windowed_seconds(shape: Shape, tokens: int, window: int, flops: float) -> float:
    """Of one layer in which a query sees so many keys."""
    return attention_flops(shape, tokens, min(1.0, 2 * window / tokens)) / flops


def choosing_seconds(tokens: float) -> float:
    """Blocks by pooled queries and keys: pooling grows with the length, scoring and ranking with its square."""
    row = measured()["choosing"]
    pooling = row["pooling_queries"] * (1 + reference().kv_heads / reference().heads)
    length = tokens / row["tokens"]
    return pooling * length + (row["seconds"] - pooling) * length**2


def product_speed() -> float:
    """Operations a second of the matrix products, at the longest prompt whose kernels were timed."""
    row = max(measured()["beside"], key=lambda row: (row["tokens"], row["layers"]))
    return product_flops(reference(), row["tokens"]) / row["products"]


def rest_seconds(shape: Shape, tokens: float) -> float:
    """Of one layer: norms, rotations, activations, storing keys."""
    row = max(measured()["beside"], key=lambda row: (row["tokens"], row["layers"]))
    return row["rest"] * tokens / row["tokens"] * shape.hidden / reference().hidden


@functools.cache
def _longest(method: str) -> list[dict[str, Any]]:
    """A method's measured steps at the longest context, one sequence and several; of dense, the faster at each."""
    names = (method,) if method else ("full", "full:attached")
    points = [p for name in names for p in measured()["decode"][name]]
    longest = [p for p in points if p["tokens"] == max(q["tokens"] for q in points)]
    best = {p["batch"]: p for p in sorted(longest, key=lambda p: -p["seconds"])}
    return [best[batch] for batch in sorted(best)]


def step_line(method: str) -> tuple[float, float]:
    """Seconds of one layer's step: (whatever the context, for each token of it), through both measured batches."""
    one, many = _longest(method)
    each = (many["seconds"] - one["seconds"]) / ((many["batch"] - one["batch"]) * one["tokens"])
    return one["seconds"] - each * one["batch"] * one["tokens"], each


def _reading(shape: Shape, way: Way, tokens: float) -> float:
    """Seconds of one layer's step on one GPU that grow with the context, windowed layers averaged in."""
    same = shape.kv_bytes / reference().kv_bytes
    dense = step_line("")[1] * same
    if way.name == "linear":
        state = shape.heads * shape.head_size**2 * STATE_BYTES
        one = 2 * state / measured()["copy"]["bytes_per_second"]  # read and written
    else:
        each = step_line(way.decode)[1] * same
        one = ((1 - way.dense_steps) * each + way.dense_steps * dense) * tokens
    windowed = shape.windowed / shape.layers
    return (1 - windowed) * one + windowed * dense * min(tokens, shape.window_tokens)


def _standing(way: Way) -> float:
    """Seconds of one layer's step that no split makes less: launches, small kernels, choosing's fixed part."""
    bare = BYTES * reference().layer_parameters / measured()["copy"]["bytes_per_second"]
    own, dense = (max(0.0, step_line(name)[0] - bare) for name in (way.decode, ""))
    return (1 - way.dense_steps) * own + way.dense_steps * dense


# --- many GPUs --------------------------------------------------------------------------------------------------------


def prefill_parts(shape: Shape, way: Way, tokens: int, split: Split, cluster: Cluster) -> dict[str, float]:
    """Seconds of all layers by what takes them. Dense attention works while keys come; what chooses must have them
    first, and waits."""
    dense = measured()["prefill"]["full"][-1]
    speed = attention_flops(reference(), dense["tokens"]) / dense["seconds"]
    own = (shape.layers - shape.windowed) * attention_seconds(shape, way, tokens)
    window = shape.windowed * windowed_seconds(shape, tokens, shape.window_tokens, speed) if shape.windowed else 0.0
    moved = (shape.layers - shape.windowed) * ring_bytes(shape, way, tokens, split) / cluster.between(split)
    attention = (own + window) / split.gpus
    beside = shape.layers * (product_flops(shape, tokens) / product_speed() + rest_seconds(shape, tokens))
    reduced = shape.layers * reduce_bytes(shape, tokens / split.tokens, split) / cluster.link
    waited = shape.layers * _waits(split, cluster)
    return {
        "beside": beside / split.gpus,
        "attention": attention,
        "keys": max(0.0, moved - attention) if way.name == "full" else moved,
        "reduce": reduced + waited,
    }


def step_parts(shape: Shape, way: Way, tokens: int, split: Split, cluster: Cluster) -> dict[str, float]:
    """Seconds of one decoding step of one sequence, by what takes them."""
    copy, read = measured()["copy"]["bytes_per_second"], _reading(shape, way, tokens)
    states = split.heads if way.name == "linear" else split.gpus  # a state is not cut by tokens
    return {
        "weights": read_bytes(shape) / split.heads / copy,
        "cache": shape.layers * read / states,
        "standing": shape.layers * _standing(way),
        "reduce": shape.layers * (_waits(split, cluster) + reduce_bytes(shape, 1, split) / cluster.link),
    }


def _waits(split: Split, cluster: Cluster) -> float:
    """Of the collectives of one layer: two over the heads, one over the tokens."""
    return cluster.wait_seconds * (2 * math.log2(split.heads) + math.log2(split.tokens))


def held_bytes(shape: Shape, way: Way, tokens: int, split: Split) -> float:
    """Weights and cache of one GPU."""
    states = split.heads if way.name == "linear" else split.gpus
    return BYTES * shape.parameters / split.heads + cache_bytes(shape, way, tokens) / states


def fits(shape: Shape, way: Way, tokens: int, split: Split, cluster: Cluster) -> bool:
    """Whether a GPU's memory holds its share."""
    return held_bytes(shape, way, tokens, split) <= ROOM * cluster.memory_bytes


# --- what is printed --------------------------------------------------------------------------------------------------

PHASES = {"prefill": prefill_parts, "decode": step_parts}


@dataclass(frozen=True)
class Cost:
    """Of one way in one phase on the fastest split; `parts` in seconds. `fits`: whether any split does."""

    way: Way
    phase: str
    split: Split
    parts: dict[str, float]
    held_bytes: float
    fits: bool

    @property
    def seconds(self) -> float:
        """Of the phase."""
        return sum(self.parts.values())


@functools.lru_cache(maxsize=2**16)
def cost(shape: Shape, way: Way, phase: str, tokens: int, cluster: Cluster) -> Cost:
    """On the fastest of the splits that fit; where none does, on the one that holds least."""
    every = [
        Cost(way, phase, split, PHASES[phase](shape, way, tokens, split, cluster),
             held_bytes(shape, way, tokens, split), fits(shape, way, tokens, split, cluster))
        for split in cluster.splits(shape)
    ]  # fmt: skip
    good = [c for c in every if c.fits]
    return min(good, key=lambda c: c.seconds) if good else min(every, key=lambda c: c.held_bytes)


def phases(way: Way) -> tuple[str, ...]:
    """Those that a way changes."""
    if way.name in ("full", "linear"):
        return ("prefill", "decode")
    return ("decode",) if way.decode else ("prefill",)


def gain(shape: Shape, way: Way, phase: str, tokens: int, cluster: Cluster) -> float | None:
    """How many times faster than `full` on the same GPUs; infinite where only the way fits, None where it does not."""
    mine, dense = (cost(shape, w, phase, tokens, cluster) for w in (way, BY_NAME["full"]))
    if not mine.fits:
        return None
    return dense.seconds / mine.seconds if dense.fits else math.inf


def _pays(shape: Shape, way: Way, phase: str, tokens: int, cluster: Cluster) -> bool:
    found = gain(shape, way, phase, tokens, cluster)
    return found is not None and found >= PAYS


def pays_from(shape: Shape, way: Way, phase: str, cluster: Cluster) -> int | None:
    """The shortest context, of the powers of two, from which a way pays on these GPUs."""
    lengths = [2**i for i in range(LEAST_TOKENS.bit_length() - 1, MOST_TOKENS.bit_length())]
    return next((n for n in lengths if _pays(shape, way, phase, n, cluster)), None)


def pays_to(shape: Shape, way: Way, phase: str, tokens: int, cluster: Cluster) -> int | None:
    """The most GPUs, of the powers of two up to 1,024, on which a way pays at this context."""
    counts = [2**i for i in range(MOST_GPUS.bit_length())]
    good = [n for n in counts if _pays(shape, way, phase, tokens, _sized(cluster, n))]
    return max(good, default=None)


def least_gpus(shape: Shape, way: Way, tokens: int, cluster: Cluster) -> int | None:
    """The fewest, of the powers of two, whose memory holds weights and cache."""
    counts = [2**i for i in range(MOST_GPUS.bit_length())]
    return next((n for n in counts if cost(shape, way, "decode", tokens, _sized(cluster, n)).fits), None)


def _sized(cluster: Cluster, gpus: int) -> Cluster:
    return Cluster(gpus, cluster.node_gpus, cluster.memory_bytes, cluster.link, cluster.network, cluster.wait_seconds)


def plan(shape: Shape, tokens: int, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """A row for each way and phase that it changes, as plain data."""
    for way in WAYS:
        for phase in phases(way):
            found, against = cost(shape, way, phase, tokens, cluster), gain(shape, way, phase, tokens, cluster)
            yield {
                "way": label(way), "family": way.family, "phase": phase, "fits": found.fits,
                "seconds": found.seconds, "parts": found.parts,
                "over_heads": found.split.heads, "over_tokens": found.split.tokens,
                "held_bytes": found.held_bytes, "cache_bytes": cache_bytes(shape, way, tokens),
                "gain": against if against is None or math.isfinite(against) else None,
                "only_this_fits": against == math.inf,
                "least_gpus": least_gpus(shape, way, tokens, cluster),
                "pays_from_tokens": pays_from(shape, way, phase, cluster) if way.family else None,
                "pays_to_gpus": pays_to(shape, way, phase, tokens, cluster) if way.family else None,
            }  # fmt: skip


def label(way: Way) -> str:
    """With the budget that was measured, unless the name says it."""
    points = measured()["prefill"].get(way.prefill) or measured()["decode"].get(way.decode)
    return f"{way.name}@{points[-1]['budget']}" if points else way.name
