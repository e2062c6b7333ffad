"""Double Sparsity: a few channels of the keys point out the tokens, exact attention reads only those."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from saccade import ops
from saccade.core.artefact import Artefact
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Decode
from saccade.core.selection import Gather, Selection, column, dense
from saccade.core.site import Site


@dataclass(frozen=True)
class DoubleSparsity(Decode):
    """Each query reads the tokens that score best over `channels` label channels of the keys.

    Few channels carry nearly all of q.k, and which ones is a property of the head: calibration ranks them once. Stored
    beside the keys, L = K[:, C] gives  s = q[C] . L^T;  the best s are read exactly:  o = softmax(q K_idx^T) V_idx.

    channels: label channels r of each key/value head
    rank: the statistic that ranked them: mean |q_c|, mean |k_c|, or mean |q_c k_c|
    label_bits: 16 stores labels as they are; 4 or 2 round them per token, between the token's least and largest label
    dense_layers: first layers that read everything. The others pay for it, so that all reads fit the budget
    recent_tokens: newest keys, the query's own among them, that are read whatever they score, within the budget
    prefill: rank and read so for every prompt token too, as the authors' accuracy code does
    group: "max": the query heads of a key/value head read the same keys, by the best score of any; they are read once

    Raises:
        BadOption: no channel.
        BadBudget: while reading, a budget in tokens or bytes that the dense layers alone exceed.
    Source: arXiv 2408.07092, section 3; andy-yang-1/DoubleSparse, modify_llama.py and offline_calibration.py.
    """

    card = Card(
        name="double-sparsity",
        title="Post-Training Sparse Attention with Double Sparsity",
        family="decode",
        paper="arXiv:2408.07092",
        year=2024,
        authors="Yang, Sheng, Gonzalez, Stoica, Zheng",
        official="andy-yang-1/DoubleSparse",
        licence_of_official="MIT",
        summary="A few calibrated key channels point out the tokens that a new query reads; everything stays stored.",
        equation="idx = top(q[C] . K[:, C]^T);  o = softmax(q K_idx^T / sqrt(d)) V_idx",
        usual=True,
        budget="stored keys that each new query reads, mean over the layers",
        calibrated=True,
        departures=(
            "Channels are ranked per key/value head: query statistics are summed over its query heads. The authors rank"
            " them per query head, which would store a label for each.",
            "All statistics are taken after the rotary embedding, as the labels are; the authors rank q, k before it.",
            "The qk statistic accumulates over all samples; in the authors' script only the last batch is kept.",
            "Layers 0 and 1 read everything, as in the authors' accuracy code; here that is part of the budget. Their"
            " fast path makes all layers sparse.",
            "Calibrated on 32 rows of 512 tokens of our own prose instead of 256 of the Pile.",
            "The budget sets the tokens read; the authors fix 128 to 4096. Token lists are per query head, as theirs;"
            " group='max', lists that the heads of a key/value head share, is ours.",
            "recent_tokens is ours, and 0 unless asked for: the newest key competes like any other.",
            "Keys stay on their device: offloading with the next layer's query predicted is not part of this.",
        ),
        lacks={"backward": "it reads a cache, which training does not have"},
    )

    channels: int = 16
    rank: Literal["qk", "k", "q"] = "qk"
    label_bits: Literal[16, 4, 2] = 16
    dense_layers: int = 2
    recent_tokens: int = 0
    prefill: bool = False
    group: Literal["per-head", "max"] = "per-head"

    def __post_init__(self):
        super().__post_init__()
        if self.channels < 1:
            raise BadOption("double-sparsity.channels=0", "no label would be left", "Give at least 1.")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "decode") if self.prefill else ("decode",)

    @property
    def replays(self) -> bool:
        return True

    def check(self, site: Site) -> list[str]:
        reasons = []
        if self.artefact is None:
            reasons.append("no channels were ranked for this model: saccade calibrate double-sparsity")
        elif tuple(self._ranked().shape) != (site.layers, site.all_kv_heads, site.head_size):
            made, here = list(self._ranked().shape), [site.layers, site.all_kv_heads, site.head_size]
            reasons.append(f"its channels are for [layers, key/value heads, head size] = {made}, here: {here}")
        if self.channels > site.head_size:
            reasons.append(f"channels={self.channels}, but a head has {site.head_size}")
        return reasons + site.budget.unpaid(site.layers, self.dense_layers)

    def index(self, k: Float[Tensor, "b g n d"], site: Site) -> dict[str, Tensor]:
        labels = self._labels(k, site)
        if self.label_bits == 16:
            return {"labels": labels}
        codes, span = quantise(labels, self.label_bits)
        return {"codes": codes, "span": span.to(k.dtype)}

    def select(self, q: Float[Tensor, "b h q d"], stored: Mapping[str, Tensor], site: Site) -> Selection:
        counts = self._counts(site)
        if counts == list(range(site.offset + 1, site.keys + 1)):
            return dense(site.queries, site.keys)
        asked = self._labels(q, site)
        if self.label_bits == 16:
            labels = stored["labels"]
        else:
            labels = dequantise(stored["codes"], stored["span"], self.label_bits, self.channels)
            asked = dequantise(*quantise(asked, self.label_bits), self.label_bits, self.channels)
        score = self._scores(asked, labels, site)
        if site.queries > 1 or self.recent_tokens:  # one query sees every key: two passes are saved
            keys = torch.arange(site.keys, device=q.device)
            behind, room = keys[site.offset :, None] - keys, column(counts, q.device)
            score = score.masked_fill(behind < 0, -torch.inf)
            score = score.masked_fill((behind >= 0) & (behind < room.clamp(max=self.recent_tokens)), torch.inf)
        index = ops.topk_rows(score, counts)
        shared = site.heads // index.shape[1]
        index = index.repeat_interleave(shared, 1) if shared > 1 else index
        return Gather(index=index, queries=site.queries, keys=site.keys, shared=shared)

    def _scores(
        self, asked: Float[Tensor, "b h q r"], labels: Float[Tensor, "b g k r"], site: Site
    ) -> Float[Tensor, "b h|g q k"]:
        if self.group == "max":  # a page of one key lies between its labels
            return ops.page_scores(asked, labels, labels, by_group=True)
        # one product per key/value head: its labels are read once
        together = asked.unflatten(1, (site.kv_heads, -1)).flatten(2, 3)
        return (together.float() @ labels.float().mT).view(*asked.shape[:3], site.keys)

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        sums = {name: torch.zeros(model.layers, model.kv_heads, model.head_size) for name in ("q", "k", "qk")}
        for step, (layer, q, k, _) in enumerate(model.capture_qkv(samples), 1):
            grouped = q[0].float().unflatten(0, (model.kv_heads, -1)).cpu()
            keys = k[0, :, None].float().cpu()
            sums["q"][layer] += grouped.abs().sum((1, 2))
            sums["k"][layer] += keys.abs().sum((1, 2))
            sums["qk"][layer] += (grouped * keys).abs().sum((1, 2))
            if progress is not None and layer == model.layers - 1:
                progress(step // model.layers, len(samples), "ranking channels")
        ranked = {name: total.argsort(-1, descending=True).to(torch.int16) for name, total in sums.items()}
        share = {name: float(_share(total, self.channels)) for name, total in sums.items()}
        return model.artefact(self, ranked, samples, {f"share of {self.channels} channels": share})

    def _ranked(self) -> Int[Tensor, "layers g d"]:
        assert self.artefact is not None, "check refuses to run without channels"
        return self.artefact.tensors[self.rank]

    @functools.cached_property
    def _copies(self) -> dict[torch.device, Int[Tensor, "layers g r"]]:
        """The label channels on each device that asked for them."""
        return {}

    def _labels(self, x: Float[Tensor, "b a n d"], site: Site) -> Float[Tensor, "b a n r"]:
        """The label channels of keys, or of queries, whose heads share those of their key/value head."""
        if x.device not in self._copies:  # once: a copy in every layer of every step makes the device wait
            self._copies[x.device] = self._ranked()[..., : self.channels].to(x.device).long()
        chosen = site.shard.mine(self._copies[x.device][site.layer]).repeat_interleave(x.shape[1] // site.kv_heads, 0)
        return x.gather(-1, chosen[None, :, None].expand(x.shape[0], -1, x.shape[2], -1))

    def _counts(self, site: Site) -> list[int]:
        """Keys that each query reads: its own budget, as if it came alone."""
        spread = (site.layer, site.layers, self.dense_layers, site.bytes_per_token)
        return [site.budget.layer_tokens(n, *spread) for n in range(site.offset + 1, site.keys + 1)]


def quantise(x: Float[Tensor, "*a r"], bits: int) -> tuple[UInt8[Tensor, "*a p"], Float[Tensor, "*a 2"]]:
    """x ~ low + step code, with code = round((x - low) / step), step = (high - low) / (2^bits - 1), over the last axis.

    Codes are packed, 8 / bits to a byte; the second tensor holds low and step.
    """
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step = step.masked_fill(step == 0, 1.0)  # all alike: code 0 gives low back
    codes = ((x.float() - low) / step).round().to(torch.uint8)
    slots = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (8 // bits))).unflatten(-1, (-1, 8 // bits))
    return (slots << _shifts(bits, x.device)).sum(-1, dtype=torch.uint8), torch.cat([low, step], -1)


def dequantise(
    packed: UInt8[Tensor, "*a p"], span: Float[Tensor, "*a 2"], bits: int, channels: int
) -> Float[Tensor, "*a r"]:
    """What `quantise` stood for, float32."""
    codes = ((packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)).flatten(-2)[..., :channels]
    low, step = span.float().split(1, -1)
    return low + step * codes


def _shifts(bits: int, device: torch.device) -> UInt8[Tensor, " s"]:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _share(total: Float[Tensor, "layers g d"], channels: int) -> Float[Tensor, ""]:
    """How much of the statistic the first channels carry, mean over heads."""
    best = total.sort(-1, descending=True).values
    return (best[..., :channels].sum(-1) / best.sum(-1)).mean()
