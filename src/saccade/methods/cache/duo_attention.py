"""DuoAttention: some heads remember everything, the others sinks and recent tokens; learned gates say which."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.selection import Selection, Spans, dense
from saccade.core.site import Site


@dataclass(frozen=True)
class DuoAttention(Cache):
    """Retrieval heads keep the whole text, streaming heads the first and the most recent tokens.

    Training finds a gate alpha per key/value head, with the model frozen:  o = alpha full + (1 - alpha) streaming,
    minimising  mean (h_full - h_duo)^2 + weight mean |alpha|  over the answers of a recall text. Deployed, the heads of
    highest alpha in the whole model are full, as many as the budget pays for:  F n + (H - F)(sink + recent) <= budget.

    sink_tokens, recent_tokens: of a streaming head (the paper deploys 64 and 256); fewer where the budget is smaller
    prefill: "lambda": streaming heads look at sinks and window from the start; "dense": a first forward is whole
    full_term: whose full attention the gated stream mixes in while training; "teacher" as in the authors' code
    train_steps, learning_rate, gate_weight: of the gate training (AdamW; weight of mean |alpha|)
    train_keys, train_key_words: pass keys in a training text, at most ten, and words of each (the paper's: 10 of 32)

    Raises:
        BadOption: no recent token, step, key or word, more than ten keys, or a rate or weight that is not above 0.
    Source: arXiv 2410.10819, sections 2.2 to 2.4; mit-han-lab/duo-attention.
    """

    rolling: ClassVar[bool] = True
    by_position = True
    card = Card(
        name="duo-attention",
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        family="cache",
        paper="arXiv:2410.10819",
        year=2024,
        authors="Xiao, Tang, Zuo, Guo, Yang, Tang, Fu, Han",
        official="mit-han-lab/duo-attention",
        licence_of_official="MIT",
        summary="Heads that retrieve keep everything, the others sinks and recent tokens; gates are trained for it.",
        equation="o = alpha full + (1 - alpha) streaming;  min (h_full - h_duo)^2 + 0.05 |alpha|",
        usual=True,
        budget="mean keys per head over the whole model at the end of the prompt; it sets how many heads are full",
        calibrated=True,
        departures=(
            "The share of full heads follows from budget and prompt length; the paper fixes it (a half, a quarter).",
            "Scaled to small contexts: 16 sinks and 64 recent tokens unless asked for, in training as deployed; the"
            " paper trains with 128 and 256 and deploys 64 and 256.",
            "The prefill uses the streaming mask from the first token; the authors' code computes the first forward"
            " dense (prefill='dense' does that).",
            "Gates are trained in float32 on one device; the authors' bfloat16 loses updates near 1.",
            "Training data: passkeys in our own shipped prose, not BookSum; fewer keys and shorter texts.",
            "Weights are not reordered: rows of equal length are stored together instead, which changes no output.",
        ),
        lacks={
            "chunks": "which heads are full depends on the prompt's length, known only at the end of a first chunk"
            " unless it is told, as generate and serve do; tokens after the prompt agree exactly, however they are cut",
            "gqa": "the number of full heads is rounded down over all key/value heads: of two copies of a head, one may"
            " be full",
        },
    )

    sink_tokens: int = 16
    recent_tokens: int = 64
    prefill: Literal["lambda", "dense"] = "lambda"
    full_term: Literal["teacher", "student"] = "teacher"
    train_steps: int = 300
    learning_rate: float = 0.02
    gate_weight: float = 0.05
    train_keys: int = 5
    train_key_words: int = 8

    def __post_init__(self):
        super().__post_init__()
        for name in ("recent_tokens", "train_steps", "train_keys", "train_key_words"):
            if getattr(self, name) < 1:
                raise BadOption(f"duo-attention.{name}=0", "it takes at least 1", "Leave it away for our value.")
        if self.train_keys > 10:
            raise BadOption(
                f"duo-attention.train_keys={self.train_keys}", "keys are named first to tenth", "Give at most 10."
            )
        for name, value in {"learning_rate": self.learning_rate, "gate_weight": self.gate_weight}.items():
            if not 0 < value < math.inf:
                raise BadOption(f"duo-attention.{name}={value}", "it takes a number above 0", "Leave it away.")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "evict")

    @property
    def foretold(self) -> bool:
        """Not where the prompt is read densely, of which nothing may go before its end."""
        return self.prefill == "lambda"

    def check(self, site: Site) -> list[str]:
        if self.artefact is None:
            return ["no gates were trained for this model: saccade calibrate duo-attention"]
        found, here = tuple(self._gates().shape), (site.layers, site.all_kv_heads)
        if found != here:
            return [f"its gates are for {found[0]} layers of {found[1]} key/value heads, here: {here[0]} of {here[1]}"]
        return []

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        site.state["prompt"] = torch.full((q.shape[0],), site.whole)  # on the host, where it is asked for
        if self.prefill == "dense":
            return dense(site.queries, site.keys)
        sinks, recent, full = self._split(site.whole, site)
        full = full.repeat_interleave(site.group).to(q.device)
        window = torch.where(full, max(site.keys, 1), recent + 1)
        return Spans(sinks=torch.full_like(window, sinks), window=window, queries=site.queries, keys=site.keys)

    def visible(
        self, q_position: Int[Tensor, "r q"], k_position: Int[Tensor, "r k"], head: Int[Tensor, " r"], site: Site
    ) -> Bool[Tensor, "r q k"]:
        behind = q_position[..., None] - k_position[:, None]
        out = torch.empty_like(behind, dtype=torch.bool)
        prompt = self._prompts(site, len(head))
        for n in prompt.unique().tolist():
            sinks, recent, full = self._split(n, site)
            rows = (prompt == n).to(head.device)
            near = (k_position[rows, None] < sinks) | (behind[rows] <= recent)
            out[rows] = near | full.to(head.device)[head[rows], None, None]
        return out

    def reach(self, queries: Sequence[int], site: Site) -> list[list[tuple[int, int]]]:
        prompts = self._prompts(site, len(queries)).tolist()
        found = {prompt: self._split(prompt, site) for prompt in set(prompts)}
        out = []
        for n, (sinks, recent, full) in zip(queries, map(found.__getitem__, prompts)):
            out.append([(sinks, n if whole else recent) for whole in full.tolist()])
        return out

    def _prompts(self, site: Site, rows: int) -> Int[Tensor, " r"]:
        """The length of each row's prompt; 0 where it began empty."""
        return site.state.get("prompt", torch.zeros(rows, dtype=torch.long))

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        gates, figures = model.train_gates(self, samples, progress)
        return model.artefact(self, {"gates": gates}, samples, figures)

    def _gates(self) -> Float[Tensor, "layers g"]:
        assert self.artefact is not None, "check refuses to run without gates"
        return self.artefact.tensors["gates"].float()

    def _split(self, prompt: int, site: Site) -> tuple[int, int, Bool[Tensor, " g"]]:
        """Sinks and recent tokens of a streaming head, and which heads of this layer are full.

        The budget buys  F = floor(H (budget - c) / (n - c))  full heads of H, c = sink + recent being what a streaming
        head holds. A budget below that is all c, and pays for no full head.
        """
        key = (prompt, site.layer, site.budget, site.bytes_per_token, site.seed)
        if key not in self._splits:
            self._splits[key] = self._find_split(prompt, site)
        sinks, recent, full = self._splits[key]
        return sinks, recent, site.shard.mine(full)

    @functools.cached_property
    def _splits(self) -> dict[tuple[Any, ...], tuple[int, int, Bool[Tensor, " g"]]]:
        """What was found: every token asks again."""
        return {}

    def _find_split(self, prompt: int, site: Site) -> tuple[int, int, Bool[Tensor, " g"]]:
        gates = self._gates()
        held = site.budget.tokens(prompt, site.bytes_per_token)
        if held >= prompt:
            return self.sink_tokens, self.recent_tokens, torch.ones(site.all_kv_heads, dtype=torch.bool)
        streaming = min(self.sink_tokens + self.recent_tokens, held)
        count = gates.numel() * (held - streaming) // (prompt - streaming)
        # the authors break ties by noise; gates are not that close otherwise
        noise = torch.rand(gates.shape, generator=rng.generator("duo-attention/ties", site.seed)) * 1e-6
        rank = (gates + noise).flatten().argsort(descending=True).argsort().view_as(gates)
        sinks = min(self.sink_tokens, streaming)
        return sinks, streaming - sinks, rank[site.layer] < count
