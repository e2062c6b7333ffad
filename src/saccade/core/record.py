"""What a run leaves: per layer, what was kept, computed, held, and on which back end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

Table = list[dict[str, Any]]  # one line per row, the same names in each: for printing or JSON


@dataclass(frozen=True)
class Notes:
    """What a probe noted of one sequence, padding left out.

    tokens: ids of all that was read; prompt: how many of them are the prompt
    layers: of each attention layer, name -> one entry per token and head
    """

    tokens: Int[Tensor, " n"]
    prompt: int
    layers: Sequence[Mapping[str, Tensor]]  # each [h n ...]


@dataclass
class LayerRecord:
    """One attention layer.

    kept: true positions stored after the last forward, one list per (row, key/value head)
    seen: tokens that went by, per row
    bytes_held, bytes_host: of the storages of this layer's cache, counted, not computed; those in host memory of them,
        where a method moved some there
    pairs, pairs_causal: (query, key) pairs computed, and what a dense causal pass would have computed, over all heads
    bits, bits_whole: of a method that packs, how many are held of a number of each token in `kept`, with what packing
        keeps beside them; and how many of one that is not packed
    reads, readers: where `Run.note_reads` asks for it, how many queries after the prompt read each true position, per
        query head [h n], and how many there were; by row
    keys_searched, keys_visited: over all queries, keys of an index that was searched, and those that were looked at
    """

    layer: int
    bytes_held: int = 0
    bytes_host: int = 0
    seen: list[int] = field(default_factory=list)
    kept: list[list[Tensor]] = field(default_factory=list)
    pairs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    pairs_causal: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bits: list[list[Tensor]] = field(default_factory=list)
    bits_whole: int = 0
    reads: dict[int, Tensor] = field(default_factory=dict)
    readers: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    keys_searched: int = 0
    keys_visited: int = 0
    back_ends: set[str] = field(default_factory=set)

    def density(self, stage: str) -> float:
        """Share of the causal pairs that were computed in "prefill" or "decode"."""
        return self.pairs[stage] / self.pairs_causal[stage] if self.pairs_causal[stage] else 1.0

    def kept_fraction(self) -> float:
        """Share of the seen tokens that is still stored, over rows and heads."""
        total = sum(n * len(heads) for n, heads in zip(self.seen, self.kept))
        return sum(len(p) for heads in self.kept for p in heads) / total if total else 1.0


@dataclass
class Record:
    """Of a whole run, one entry per attention layer the method works in."""

    layers: dict[int, LayerRecord] = field(default_factory=dict)

    def layer(self, index: int) -> LayerRecord:
        """The entry of a layer, made at first use."""
        return self.layers.setdefault(index, LayerRecord(index))

    @property
    def bytes_held(self) -> int:
        """Bytes in all layers' caches."""
        return sum(layer.bytes_held for layer in self.layers.values())

    @property
    def bytes_host(self) -> int:
        """Those of them in host memory; the others are on the model's device."""
        return sum(layer.bytes_host for layer in self.layers.values())

    @property
    def visited_fraction(self) -> float:
        """Share of the searched keys that searches looked at; 1 where nothing was searched."""
        there = sum(layer.keys_searched for layer in self.layers.values())
        return sum(layer.keys_visited for layer in self.layers.values()) / there if there else 1.0

    def density(self, stage: str = "prefill") -> float:
        """Share of the causal pairs computed, over all layers."""
        causal = sum(layer.pairs_causal[stage] for layer in self.layers.values())
        return sum(layer.pairs[stage] for layer in self.layers.values()) / causal if causal else 1.0

    @property
    def kept_fraction(self) -> float:
        """Share of the seen tokens still stored, over layers, rows and heads."""
        shares = [layer.kept_fraction() for layer in self.layers.values()]
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def back_ends(self) -> list[str]:
        """What computed: "op:implementation", sorted."""
        return sorted(set().union(*[layer.back_ends for layer in self.layers.values()]))

    def table(self) -> Table:
        """One row per layer, for printing or JSON."""
        return [
            {
                "layer": layer.layer,
                "seen": max(layer.seen, default=0),
                "kept_fraction": layer.kept_fraction(),
                "bytes_held": layer.bytes_held,
                "prefill_density": layer.density("prefill"),
                "decode_density": layer.density("decode"),
                "back_ends": sorted(layer.back_ends),
            }
            for layer in sorted(self.layers.values(), key=lambda r: r.layer)
        ]
