"""MInference: every head keeps its shape of attention; where its lines lie is estimated from the last queries."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Blocks, Lines, PerHead, Selection, Spans, dense
from saccade.core.site import Site

_log = logging.getLogger("saccade")


class Pattern(NamedTuple):
    """A head's shape and its sizes at `tokens` of prompt: columns and slashes, first and last keys, or key blocks."""

    shape: Literal["lines", "spans", "blocks"]
    first: int
    second: int
    tokens: int = 8192

    def at(self, n: int) -> tuple[float, float]:
        """The sizes at a prompt of n tokens."""
        return self.first * n / self.tokens, self.second * n / self.tokens


# the search space, of about equal cost per shape at 8192 tokens; the last is what the authors fall back to, at 30k
CANDIDATES = (
    Pattern("lines", 30, 400),
    Pattern("lines", 100, 350),
    Pattern("lines", 250, 300),
    Pattern("lines", 1500, 64),
    Pattern("spans", 64, 400),
    Pattern("blocks", 16, 0),
    Pattern("lines", 1000, 6096, 30_000),
)
DEFAULT = CANDIDATES[-1]


@dataclass(frozen=True)
class MInference(Sparse):
    """Compute only the columns and diagonals, the blocks, or the two ends that a head is known to look at.

    Offline, each head is given the shape that holds most attention mass at equal cost. For a prompt, a "lines" head
    takes P = softmax(Q[-L:] K^T / sqrt(d)), its columns top_v(sum_rows P) and its diagonals top_s(sum_diagonals P); a
    "blocks" head the best pairs of mean-pooled blocks; a "spans" head the first and the last keys.

    sizes: "budget" scales every head's sizes to the pairs that the budget allows, in about their proportion; "pattern"
        uses them as searched, for the length at hand, and takes no budget
    last_queries: L, the queries that the estimate asks
    sink_tokens, recent_tokens: columns and diagonals that rank before all others
    block_tokens: rows that share lines; a smaller power of two where the budget pays for less than two such blocks
    min_len_tokens: shorter prompts are computed dense, which is then faster; logged, and to be seen in the record
    force_diagonal: "blocks" heads always keep the diagonal block; the authors do not
    search_density: share of the pairs that each candidate may compute in `calibrate`

    Raises:
        BadOption: no query to ask, no recent diagonal, no row in a block.
        BadBudget: a search density that is no fraction.
    Source: arXiv 2407.02490, section 3 and appendix; microsoft/MInference (minference_forward.py,
    vertical_slash_index.cu).
    """

    card = Card(
        name="minference",
        title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        family="sparse",
        paper="arXiv:2407.02490",
        year=2024,
        authors="Jiang, Li, Zhang, Wu, Luo, Ahn, Han, Abdi, Li, Lin, Yang, Qiu",
        official="microsoft/MInference",
        licence_of_official="MIT",
        summary="Each head computes its own shape: columns and diagonals, blocks, or both ends; found per prompt.",
        equation="top_v(sum_rows P), top_s(sum_diagonals P);  P = softmax(Q[-64:] K^T / sqrt(d))",
        usual=True,
        budget="causal pairs computed in the prefill, in every head; 1 is dense, also when no budget is given"
        " (sizes='pattern' uses the searched sizes instead)",
        calibrated=True,
        departures=(
            "Sizes follow from the budget, columns to diagonals in the proportion of the head's pattern (columns take"
            " what the diagonals leave); the paper fixes them, whatever the length.",
            "Without patterns for the model every head takes the authors' default, 1000 columns and 6096 diagonals at"
            " 30k tokens, scaled.",
            "Candidates are compared at equal density (search_density), over rows from a quarter of the prompt on; the"
            " authors compare fixed sizes whose kernels cost about the same, over rows from 2500 on.",
            "A head that is best as two ends or as blocks is run as such; the authors' search then writes columns and"
            " diagonals.",
            "Pooled means count the tokens a block has; the authors also count padding.",
            "128 rows share lines and blocks are 128 keys wide; the authors' 64 keep as much attention mass at the same"
            " density, and take a third longer here.",
            "With sizes='pattern' a head has at least sink_tokens columns and recent_tokens diagonals; the authors'"
            " least are 30 and 50.",
            "Scores of the lines are float32 whatever the model's precision.",
        ),
        lacks={
            "chunks": "lines are estimated from the last queries there are, which differ from chunk to chunk",
            "causality": "the last queries of the prompt decide where earlier ones look",
        },
    )

    sizes: Literal["budget", "pattern"] = "budget"
    last_queries: int = 64
    sink_tokens: int = 30
    recent_tokens: int = 100
    block_tokens: int = 128
    min_len_tokens: int = 0
    force_diagonal: bool = False
    search_density: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        for name in ("last_queries", "recent_tokens", "block_tokens"):
            if getattr(self, name) < 1:
                raise BadOption(f"minference.{name}=0", "it takes at least 1", "Leave it away for the authors' value.")
        Budget(self.search_density)

    def check(self, site: Site) -> list[str]:
        reasons = super().check(site)
        if self.sizes == "pattern" and site.budget != Budget(1.0):
            reasons.append(f"sizes='pattern' computes what was searched, and would ignore the budget {site.budget}")
        here = (site.layers, site.all_heads)
        if self.artefact is not None and tuple(self.artefact.tensors["pattern"].shape) != here:
            found = tuple(self.artefact.tensors["pattern"].shape)
            reasons.append(f"its patterns are for (layers, heads) = {found}, here: {here}")
        return reasons

    # --- one prompt -------------------------------------------------------------------------------------------------

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        if site.keys < self.min_len_tokens:
            _log.info("minference: %d tokens < min_len_tokens=%d, computed dense", site.keys, self.min_len_tokens)
            return dense(site.queries, site.keys)
        if self.sizes == "budget" and site.budget.row_tokens(site.keys) >= site.keys:
            return dense(site.queries, site.keys)
        parts = []
        patterns = self._patterns(site)
        for shape, build in (("lines", self._lines), ("spans", self._spans), ("blocks", self._blocks)):
            mine = [i for i, pattern in enumerate(patterns) if pattern.shape == shape]
            if not mine:
                continue
            heads = torch.tensor(mine, device=q.device)
            sizes = torch.tensor([patterns[i].at(site.keys) for i in mine], device=q.device)
            if len(mine) == len(patterns):
                return build(q, k, sizes, site)
            keys = k.index_select(1, heads // site.group)
            parts.append((heads, build(q.index_select(1, heads), keys, sizes, site)))
        return PerHead(parts=tuple(parts), queries=site.queries, keys=site.keys)

    def _patterns(self, site: Site) -> list[Pattern]:
        """Of every head in this layer."""
        if self.artefact is None:
            return [DEFAULT] * site.heads
        known = [Pattern(*row) for row in self.artefact.figures["candidates"]]
        return [known[i] for i in site.shard.mine(self.artefact.tensors["pattern"][site.layer]).tolist()]

    def _block(self, site: Site) -> int:
        """Rows and keys of a block, so that at least two blocks fit into the keys of a row."""
        if self.sizes == "pattern":
            return self.block_tokens
        return min(self.block_tokens, 1 << max(0, (site.budget.row_tokens(site.keys) // 2).bit_length() - 1))

    def _spans(self, q: Tensor, k: Tensor, sizes: Float[Tensor, "h 2"], site: Site) -> Spans:
        if self.sizes == "budget":
            row = site.budget.row_tokens(site.keys)
            sinks = (row * sizes[:, 0] / sizes.sum(-1)).long()
            window = row - sinks
        else:
            sinks, window = sizes.long().clamp(min=1).unbind(-1)
        return Spans(sinks=sinks, window=window, queries=site.queries, keys=site.keys)

    def _blocks(self, q: Tensor, k: Tensor, sizes: Float[Tensor, "h 2"], site: Site) -> Blocks:
        block = self._block(site)
        share = site.budget.row_tokens(site.keys) if self.sizes == "budget" else float(sizes[0, 0]) * block
        keep = max(1, int(share / block))
        return ops.pool_and_select(
            q, k, keep_blocks=keep, q_block=block, k_block=block, force_diagonal=self.force_diagonal
        )

    def _lines(self, q: Tensor, k: Tensor, sizes: Float[Tensor, "h 2"], site: Site) -> Lines:
        last = q[:, :, -self.last_queries :]
        columns, diagonals = ops.line_scores(last, k, scale=site.scale, softcap=site.softcap)
        columns[..., : self.sink_tokens] = torch.inf
        diagonals[..., : self.recent_tokens] = torch.inf
        columns, diagonals = (x.argsort(dim=-1, descending=True, stable=True) for x in (columns, diagonals))
        if self.sizes == "budget":
            row, block = site.budget.row_tokens(site.keys), self._block(site)
            return ops.fit_lines(columns, diagonals, sizes, row_tokens=row, block=block, queries=site.queries)
        counts = torch.maximum(sizes.long(), sizes.new_tensor([self.sink_tokens, self.recent_tokens]).long())
        counts = counts.clamp(max=site.keys).expand(q.shape[0], -1, -1)
        shape = {"block": self._block(site), "queries": site.queries, "keys": site.keys}
        return ops.draw_lines(columns, diagonals, counts, **shape)

    # --- offline ----------------------------------------------------------------------------------------------------

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        """The shape of each head: the candidate that, at equal density, holds most attention mass in the samples."""
        places = {spot.place.layer: asdict(spot.place) for spot in model.found.sites}
        held = torch.zeros(len(CANDIDATES), model.layers, model.heads, dtype=torch.float64)
        for step, (layer, q, k, v) in enumerate(model.capture_qkv(samples)):
            n = q.shape[2]
            budget = Budget(self.search_density)
            site = Site(**places[layer], stage="prefill", queries=n, keys=n, seen=n, budget=budget)
            held[:, layer] += self._kept_mass(q, k, v, site) / len(samples)
            if progress is not None:
                progress(step + 1, len(samples) * model.layers, "minference: patterns of layers")
        best = held.argmax(0)
        figures = {
            "candidates": [list(pattern) for pattern in CANDIDATES],
            "kept_mass": held.mean((1, 2)).tolist(),
            "kept_mass_of_best": float(held.amax(0).mean()),
            "heads": best.flatten().bincount(minlength=len(CANDIDATES)).tolist(),
        }
        return model.artefact(self, {"pattern": best}, samples, figures)

    def _kept_mass(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Float[Tensor, "candidates h"]:
        """Attention mass of each candidate in each head, over the rows from a quarter of the prompt on.

        A row's mass is exp(lse over the selection - lse over all keys), so that no map is made.
        """
        options = {"scale": site.scale, "softcap": site.softcap}
        whole = ops.attend(q, k, v, dense(site.queries, site.keys), **options)[1]
        out = []
        for pattern in CANDIDATES:
            build = {"lines": self._lines, "spans": self._spans, "blocks": self._blocks}[pattern.shape]
            sizes = torch.tensor([pattern.at(site.keys)] * site.heads, device=q.device)
            part = ops.attend(q, k, v, build(q, k, sizes, site), **options)[1]
            out.append(torch.exp((part - whole)[:, :, site.queries // 4 :].double()).mean((0, 2)))
        return torch.stack(out).cpu()
