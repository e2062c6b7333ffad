"""Time layers against full attention in the same slot, length by length: how their times grow with the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saccade.core import registry, rng
from saccade.core.budget import Budget
from saccade.core.method import Mixer, Slot
from saccade.measure import stats
from saccade.measure.bench import LENGTHS, ROUNDS, Row, Watch, first_call, how_often, timed
from saccade.methods.nets import make_mixer

FULL = "full"
ROOT = "sqrt"  # in options of a layer: the root of the number of tokens
SHAPE = (8, 64)  # heads and their size


@dataclass(frozen=True)
class Work:
    """One layer, and on what. lengths: None: those usual on the device."""

    device: str
    dtype: str
    budget: Budget
    lengths: Sequence[int] | None = None
    heads: int = SHAPE[0]
    head_size: int = SHAPE[1]
    batch: int = 1

    def every(self) -> list[int]:
        """The lengths, ascending."""
        return sorted(set(self.lengths or LENGTHS[torch.device(self.device).type]))

    def forward(self, spec: str, tokens: int) -> tuple[Callable[[], Any], torch.nn.Module]:
        """A forward over random inputs, and the layer. Raises what `make_mixer` raises."""
        spec = spec.replace(f"={ROOT}", f"={max(1, round(tokens**0.5))}")
        channels, kind = self.heads * self.head_size, getattr(torch, self.dtype)
        layer = make_mixer(spec, Slot(channels, self.heads, budget=self.budget)).to(self.device, kind).eval()
        x = torch.randn(self.batch, tokens, channels, generator=rng.generator("layers"))
        x = x.to(self.device, kind)
        return lambda: layer(x)[0], layer


def is_layer(name: str) -> bool:
    """Whether a name is that of a trainable layer, which has no place in a pretrained model.

    Raises:
        UnknownName: it is nobody's.
    """
    return issubclass(registry.get(registry.split(name)[0]), Mixer)


@torch.no_grad()
def bench_layers(
    specs: Sequence[str], work: Work, rounds: int = ROUNDS, watch: Watch | None = None
) -> tuple[list[Row], list[Row]]:
    """A row for each layer and length, full attention first; and what ran out of memory."""
    rows, failed = [], []
    jobs = [(spec, n) for n in work.every() for spec in dict.fromkeys([FULL, *specs])]
    for i, (spec, tokens) in enumerate(jobs):
        if watch is not None:
            watch(i, len(jobs), f"{spec} at {tokens:,} tokens")
        try:
            rows.append(_row(spec, tokens, work, rounds))
        except torch.OutOfMemoryError as e:
            failed.append({"label": spec, "tokens": tokens, "text": str(e).splitlines()[0]})
    full = {row["tokens"]: row["seconds"] for row in rows if row["layer"] == FULL}
    for row in rows:
        dense = full.get(row["tokens"])
        row["speedup"] = None if dense is None else dense / row["seconds"]
    return sorted(rows, key=lambda row: [FULL, *specs].index(row["layer"])), failed


def _row(spec: str, tokens: int, work: Work, rounds: int) -> Row:
    call, layer = work.forward(spec, tokens)
    device = torch.device(work.device)
    first = first_call(call, device)
    many = how_often(call, device)
    spread = stats.median_spread([timed(call, many, device) for _ in range(rounds)])
    about = {"layer": spec, "tokens": tokens, "density": layer.density() if isinstance(layer, Mixer) else None}
    return about | first | {"seconds": spread["median"], "least": spread["low"], "largest": spread["high"]}


def slopes(rows: Sequence[Row], by: Sequence[str], times: Sequence[str] = ("seconds",)) -> Iterator[Row]:
    """The power of the length with which times grow, for what was timed at three lengths or more.

    by: the fields that tell lines apart; times: the fields that are looked at
    """
    for who in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in by) == who]
        for name in times:
            points = [(row["tokens"], row[name]) for row in mine if row[name]]
            if len({n for n, _ in points}) >= 3:
                yield {"who": ", ".join(map(str, who)), "of": name, "power": stats.slope(points), "points": len(points)}
