"""The map that a method attends to: which pairs it chose, and where the exact mass lies, layer by layer, head by head.

What is chosen: of a method with a part in the prompt, the pairs that it computed there; of one with a part behind it,
what each of the last tokens, read one by one, could see or did read. The exact mass is the softmax over all keys of the
same queries and keys: those that the model had with the method at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.attach.engine import Place
from saccade.attach.overhear import Heard, overhearing
from saccade.core.budget import FULL, Budget
from saccade.core.errors import BadInput, CannotRun
from saccade.core.method import made
from saccade.core.selection import causal_mask
from saccade.core.site import Stage
from saccade.measure.contestants import Contestant, Spec, parse

CELLS = 48  # of a map, along each axis
LATER_TOKENS = 48  # read one by one after the prompt: a row of the map each
LEAST_TOKENS, MOST_TOKENS = 4, 4096  # whole masks of n x n pairs are made
QUERIES = 512  # whose exact mass is held together
BEHIND = ("evict", "pack", "decode")  # parts that are at work after the prompt

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Maps:
    """Of one layer. Rows are stretches of queries, columns stretches of keys.

    chosen: of the pairs of a cell that causality allows, the share that was chosen; NaN where it allows none
    mass: exact mass that falls into the cell, mean over the queries of the row: a row sums to 1
    density: pairs chosen, of all that causality allows
    covered: exact mass on chosen pairs, mean over the queries
    """

    chosen: Float[Tensor, "h r c"]
    mass: Float[Tensor, "h r c"]
    density: Float[Tensor, " h"]
    covered: Float[Tensor, " h"]


@dataclass(frozen=True)
class Stretch:
    """Maps of the queries from position `first` on, over all keys up to the last of them; one for each layer.

    stage: "prefill", the queries of the prompt, or "decode", those after it
    """

    stage: Stage
    first: int
    queries: int
    layers: Sequence[Maps]

    @property
    def keys(self) -> int:
        """How many there are for the last query."""
        return self.first + self.queries

    @property
    def covered(self) -> float:
        """Exact mass on what was chosen, mean over all heads."""
        return float(torch.cat([maps.covered for maps in self.layers]).mean())

    @property
    def density(self) -> float:
        """Pairs chosen, mean over all heads."""
        return float(torch.cat([maps.density for maps in self.layers]).mean())


@dataclass(frozen=True)
class Attended:
    """What was asked for, and what came: the prompt first, where the method has a part in it."""

    label: str
    budget: str
    stretches: Sequence[Stretch]


def attended(
    model: Any,
    ids: Int[Tensor, "1 n"],
    who: Spec | Contestant,
    budget: float | str | Budget = FULL,
    seed: int = 0,
    progress: Progress | None = None,
    later_tokens: int = LATER_TOKENS,
) -> Attended:
    """Let a method read a text, and draw where it looks.

    who: as `compare` takes it. Of a method that is at work after the prompt the end of the text is read one by one:
        `later_tokens`, or half of a short text

    Raises:
        CannotRun: with every reason; of what only looks on, or is a layer to be trained, there is no such map.
        BadInput: a text too short or too long.
        UnknownName, BadOption, BadBudget, DoesNotCompose: as `attach` does.
    """
    who, budget = who if isinstance(who, Contestant) else parse(who), Budget.of(budget)
    stages = _stages(who)
    _check_length(model, ids)
    later = min(later_tokens, ids.shape[1] // 2) if "decode" in stages else 0
    said, prompt = progress or _silent, ids.shape[1] - later
    methods = list(who.methods) or [made("full")]
    ids = ids.to(model.get_input_embeddings().weight.device)
    with attach(model, methods, budget=budget, seed=seed) as run, torch.no_grad():
        spans: dict[Stage, tuple[int, int]] = {"prefill": (0, prompt), "decode": (prompt, later)}
        heard = _Heads({stage: spans[stage] for stage in stages})
        with overhearing(run, heard.hear):
            said(0, later + 1, f"{who.label} reads {prompt} tokens")
            cache = model(ids[:, :prompt], use_cache=True, logits_to_keep=1)[CACHE]
            for i in range(prompt, ids.shape[1]):
                said(i - prompt + 1, later + 1, f"{who.label} reads token by token")
                model(ids[:, i : i + 1], **{CACHE: cache}, use_cache=True)
    return Attended(who.label, str(budget), [heard.stretch(stage) for stage in stages])


def _silent(done: int, total: int, text: str) -> None:
    """Nobody is told."""


def _stages(who: Contestant) -> list[Stage]:
    """Where it has a part: in the prompt, behind it, or both; `full`, which has none, is shown in the prompt."""
    if "observe" in who.parts:
        found = "it only looks on, and chooses nothing"
        raise CannotRun(f"a picture of what {who.label!r} attends to", found, "See where heads look: saccade calibrate")
    stages: list[Stage] = ["prefill"] if "prefill" in who.parts or not who.parts else []
    return stages + (["decode"] if set(BEHIND) & set(who.parts) else [])


def _check_length(model: Any, ids: Tensor) -> None:
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise BadInput(f"a picture of ids {tuple(ids.shape)}", "they are not [1, tokens]", "Give one text.")
    tokens, asked = ids.shape[1], f"a picture of {ids.shape[1]:,} tokens"
    if tokens < LEAST_TOKENS:
        raise BadInput(asked, f"it takes {LEAST_TOKENS} or more", "Give more text.")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and tokens > limit:
        raise BadInput(asked, f"the model was trained for {limit:,}", "Give less text.")
    if tokens > MOST_TOKENS:
        raise BadInput(asked, f"every pair is looked at, of {MOST_TOKENS:,} tokens at most", "Give less text.")


class _Heads:
    """Sums over what is heard, by stage and layer. `spans`: first position and number of the queries of each stage."""

    def __init__(self, spans: dict[Stage, tuple[int, int]]):
        self.spans = spans
        self.keys: dict[int, Float[Tensor, "g n d"]] = {}  # of each layer, by position
        self.sums: dict[Stage, dict[int, _Sums]] = {stage: {} for stage in spans}

    def hear(self, heard: Heard) -> None:
        """Add a forward. Tokens that are read again bring new keys, and ask nothing new."""
        layer, k = heard.place.layer, heard.k
        before = self.keys.get(layer, k[:, :0])
        end = heard.first + k.shape[1]
        self.keys[layer] = torch.cat([before[:, : heard.first], k, before[:, end:]], 1)
        if before.shape[1] > heard.first or heard.stage not in self.spans:
            return
        first, queries = self.spans[heard.stage]
        sums = self.sums[heard.stage].setdefault(layer, _Sums(heard.place.heads, first, queries, k.device))
        for start, mass in exact_mass(heard.place, heard.q, self.keys[layer]):
            sums.add(heard.first + start, mass, heard.computed[:, start : start + mass.shape[1]])

    def stretch(self, stage: Stage) -> Stretch:
        """What came of it."""
        return Stretch(stage, *self.spans[stage], [sums.maps() for _, sums in sorted(self.sums[stage].items())])


def exact_mass(
    place: Place, q: Float[Tensor, "h q d"], k: Float[Tensor, "g n d"]
) -> Iterator[tuple[int, Float[Tensor, "h some n"]]]:
    """softmax(scale q k^T) of the newest queries over all keys, causal, some queries at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[0] // k.shape[0], 0)
    allowed = causal_mask(q.shape[1], k.shape[1], q.device)
    for start in range(0, q.shape[1], QUERIES):
        logits = q[:, start : start + QUERIES].to(wide) @ keys.mT * place.scale
        if place.softcap is not None:
            logits = place.softcap * torch.tanh(logits / place.softcap)
        yield start, logits.masked_fill(~allowed[start : start + QUERIES], -torch.inf).softmax(-1)


class _Sums:
    """Sums of one layer over the cells of its maps."""

    def __init__(self, heads: int, first: int, queries: int, device: torch.device):
        self.first, self.queries = first, queries
        self.rows, self.columns = _cells(queries, device), _cells(first + queries, device)
        shape = (heads, self.rows.shape[1], self.columns.shape[1])
        self.mass, self.chosen = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        self.covered = self.mass.new_zeros(heads)

    def add(self, position: int, mass: Float[Tensor, "h q n"], computed: Bool[Tensor, "h q n"]) -> None:
        """Queries from `position` on."""
        mass = mass.double()
        self.covered += torch.where(computed, mass, 0.0).sum((-2, -1))
        self.mass += self._by_cell(position, mass)
        self.chosen += self._by_cell(position, computed.double())

    def _by_cell(self, position: int, values: Float[Tensor, "h q n"]) -> Float[Tensor, "h r c"]:
        start, (_, queries, keys) = position - self.first, values.shape
        return self.rows[start : start + queries].mT @ (values @ self.columns[:keys])

    def maps(self) -> Maps:
        """Sums as shares."""
        allowed = causal_mask(self.queries, self.first + self.queries, self.rows.device).double()
        pairs = self._by_cell(self.first, allowed[None])[0]
        shares = torch.where(pairs > 0, self.chosen / pairs, torch.nan)
        density, covered = self.chosen.sum((-2, -1)) / pairs.sum(), self.covered / self.queries
        return Maps(*(x.cpu() for x in (shares, self.mass / self.rows.sum(0)[:, None], density, covered)))


def _cells(count: int, device: torch.device) -> Float[Tensor, "n cells"]:
    """1 where a place lies in one of at most `CELLS` stretches of equal length."""
    cells = min(CELLS, count)
    place = torch.arange(count, device=device) * cells // count
    return (place[:, None] == torch.arange(cells, device=device)).double()
