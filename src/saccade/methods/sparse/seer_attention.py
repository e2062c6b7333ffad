"""SeerAttention: a small learnt gate in each layer says which blocks of the attention map are worth computing."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.core import bounds
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Selection, dense
from saccade.core.site import Site


@dataclass(frozen=True)
class SeerAttention(Sparse):
    """Predict the attention map by blocks from pooled queries and keys, and compute the best blocks only.

    Queries and keys before their rotation are pooled over blocks of b tokens, projected, and rotated to where their
    block begins:  Q = R(mean q),  K = R(W [max k, min k, mean k]),  S = Q K^T / sqrt(e).  Each head keeps the key
    blocks of largest S in each row of blocks. W is learnt from the frozen model's own maps,
    min KL(G || softmax S),  G[I, J] = max_{i in I, j in J} A_ij / sum_J'.

    block_tokens: b, for queries and keys; a smaller power of two where a row of the budget is shorter than four blocks
    threshold: keep the blocks with softmax S at or above it, as many as they are, and take no budget; None: by budget
    dense_last_blocks: last blocks of queries that see everything; fewer where they take over an eighth of the budget
    train_parts: 0: W for every query head, as wide as a head; else W for every key/value head and another for the
        queries, so many heads wide
    train_steps, train_texts, learning_rate: of the training (AdamW, cosine); texts of a step

    Raises:
        BadOption: an empty block, no step or text, a threshold outside [0, 1), a rate that is not above 0.
        BadInput: samples of different lengths, or of one block.
    Source: arXiv 2410.13276, section 3; microsoft/SeerAttention, prefill_sparse.
    """

    card = Card(
        name="seer-attention",
        title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
        family="sparse",
        paper="arXiv:2410.13276",
        year=2024,
        authors="Gao, Zeng, Du, Cao, Zhou, Qi, Lai, So, Cao, Yang, Yang",
        official="microsoft/SeerAttention",
        licence_of_official="MIT",
        summary="A gate in each layer, distilled from the model's own maps, picks the blocks that a prefill computes.",
        equation="top_K(R(mean q) . R(W [max k, min k, mean k]));  min KL(pooled map || softmax)",
        budget="causal pairs computed in the prefill, in every head; 1 is dense, also when no budget is given"
        " (threshold takes none)",
        calibrated=True,
        departures=(
            "Blocks per row follow from the budget, what is left of a block going to the next row; the authors keep"
            " int((1 - sqrt(1 - r)) n / b) in each. The diagonal and the last rows of blocks are paid for by it.",
            "The mean query is R^T q summed after its rotation; the same, since a rotation is linear.",
            "KL is summed over keys and averaged over rows of blocks; the authors average over all entries, so that"
            " their gradients shrink with the length.",
            "Gates begin at the mean of the keys, with noise; the authors begin at noise alone, and train on 0.5"
            " billion tokens.",
            "Weights are stored in 8 bits, with a scale for each column; the authors' are bfloat16.",
            "A gate wider than a head is rotated in parts of a head's size; the authors rotate it as one.",
            "Attention while decoding is dense. SeerAttention-R (arXiv:2506.08889) is another method.",
        ),
        lacks={
            "chunks": "blocks of queries are counted from where a forward starts, blocks kept from the length there is",
            "causality": "the queries of a block choose together, by keys of the whole block",
        },
    )

    block_tokens: int = 64
    threshold: float | None = None
    dense_last_blocks: int = 2
    train_parts: int = 0
    train_steps: int = 500
    train_texts: int = 16
    learning_rate: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        bounds.at_least_one(self, "block_tokens", "train_steps", "train_texts")
        bounds.above_zero(self, "learning_rate")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            asked = f"seer-attention.threshold={self.threshold}"
            raise BadOption(asked, "it takes a share of a row's attention, from 0", "The authors' are 5e-4 to 5e-3.")

    def check(self, site: Site) -> list[str]:
        if self.artefact is None:
            return ["no gates were trained for this model: saccade calibrate seer-attention"]
        reasons, tensors = super().check(site), self.artefact.tensors
        if site.turn is None:
            reasons.append(f"layer {site.layer}: how it marks positions is not known, and gates see queries without")
        if self.threshold is not None and site.budget != Budget(1.0):
            ignored = f"would ignore the budget {site.budget}"
            reasons.append(f"threshold={self.threshold} keeps every block that reaches it, and {ignored}")
        heads, size = tensors.get("queries", tensors["keys"]).shape[1], tensors["keys"].shape[-2] // 3
        found, here = (len(tensors["keys"]), heads, size), (site.layers, site.all_heads, site.head_size)
        if found != here:
            reasons.append(f"its gates are for (layers, heads, head size) = {found}, here: {here}")
        return reasons

    # --- one prompt -------------------------------------------------------------------------------------------------

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        return self.choose(q, k, self._gate(site, q.device), site)

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, gate: ops.Gate, site: Site) -> Selection:
        """Where a gate says to look."""
        row = site.budget.row_tokens(site.keys)
        if self.threshold is None and row >= site.keys:
            return dense(site.queries, site.keys)
        assert site.turn is not None, "check refuses to run without"
        block = self.block_tokens
        if self.threshold is None:
            block = min(block, 1 << max(0, (row // 4).bit_length() - 1))
        score = ops.block_gate(q, k, gate, site.turn, block=block, first=site.seen - site.keys)
        by = {"row_tokens": row} if self.threshold is None else {"threshold": self.threshold}
        shape = {"queries": site.queries, "keys": site.keys, "block": block}
        return ops.choose_blocks(score, **shape, **by, whole_last=self.dense_last_blocks)

    def gates(self) -> dict[str, Float[Tensor, "layers heads i e"]]:
        """The weights of all layers, by name, in float32."""
        assert self.artefact is not None, "check refuses to run without gates"
        codes = self.artefact.tensors
        return {name: codes[name] * codes[f"{name}_scale"].float() for name in ("keys", "queries") if name in codes}

    def _gate(self, site: Site, device: torch.device) -> ops.Gate:
        if device not in self._placed:
            self._placed[device] = {name: x.to(device) for name, x in self.gates().items()}
        mine = {name: site.shard.mine(x[site.layer]) for name, x in self._placed[device].items()}
        return ops.Gate(mine["keys"], mine.get("queries"))

    @functools.cached_property
    def _placed(self) -> dict[torch.device, dict[str, Tensor]]:
        """Gates where they are used: copying them there for every prompt would take longer than asking them."""
        return {}

    # --- offline ----------------------------------------------------------------------------------------------------

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        """Gates of all layers, from one dense forward over each sample."""
        gates, figures = model.distil_gates(self, samples, progress)
        return model.artefact(self, stored(gates), samples, figures)


def stored(gates: Mapping[str, Float[Tensor, "layers heads i e"]]) -> dict[str, Tensor]:
    """Weights as an artefact holds them: in 8 bits, with a scale for each column."""
    out = {}
    for name, x in gates.items():
        scale = (x.detach().abs().amax(-2, keepdim=True) / 127).clamp(min=1e-6).half()
        out |= {name: (x.detach() / scale.float()).round().clamp(-127, 127).to(torch.int8), f"{name}_scale": scale}
    return out
