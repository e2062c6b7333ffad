"""SEA: a small net guesses the attention map at a low resolution, and its best pixels are computed exactly."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, pad

from saccade import ops
from saccade.core import bounds, rng
from saccade.core.artefact import Artefact
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Gather, Selection, dense
from saccade.core.site import Site

THETA = 10_000.0  # base of the code of positions
LEAST_FEATURE = 1e-3
DILATION = 2
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sea(Sparse):
    """Estimate each row of the map in P pixels, compute the tokens of the best pixels of all heads, and mix in a mean.

    c = linear attention with values [I(t), v];  e = gelu(norm(W [c, v]));  est = softmax(CNN(decoder(e)))  [T, P];
    token j of a row of L tokens has pixel floor((j + 1/2) P / L); the heads of a row share one budget of tokens;
    o = s_2 s_1 softmax_kept(q.k) v + (1 - s_2) mean(v),  s_1, s_2 = sigmoid(W' e).
    The model stays as it is; weights of each layer learn, from its own maps A and outputs, to lower
    KL(A || est) / 10 + |A - est|^2 + |o - A v|^2, est spread over the tokens of its pixels.

    pixels: P, a multiple of 4
    train_steps, train_texts, learning_rate: of the training (AdamW, cosine), so many texts a step
    train_share: of the pairs, what o has in the training

    Raises:
        BadOption: P that is no multiple of 4 above 0, no step or text, a share outside (0, 1], a rate not above 0.
        BadInput: samples of different lengths.
    Source: arXiv 2310.01777, section 3; gmlwns2000/sea-attention, perlin_attention/attention.py.
    """

    card = Card(
        name="sea",
        title="SEA: Sparse Linear Attention with Estimated Attention Mask",
        family="sparse",
        paper="arXiv:2310.01777",
        year=2024,
        authors="Lee, Kim, Willette, Hwang",
        official="gmlwns2000/sea-attention",
        summary="A linear estimator draws a small picture of the map; its best pixels are exact, a mean is mixed in.",
        equation="o = s_2 s_1 softmax_{top pixels}(q.k) v + (1 - s_2) mean v",
        budget="causal pairs computed in the prefill, heads sharing a row's; 1 is dense, with no mean mixed in. What"
        " the estimator costs is not counted",
        calibrated=True,
        departures=(
            "The model's weights are frozen, and only the estimator and its gates learn, by the losses of their layer;"
            " the authors train the whole model, with the losses of hidden states and words beside them.",
            "The error of the output is taken over its mean square, so that layers weigh alike.",
            "Pixels are taken, best first, while their tokens are paid for; the authors keep H k P / L of them,"
            " whatever they hold. A query's own token always is kept, in every head, and paid for first.",
            "Positions are coded by sines, so that longer texts work; the authors learn a table.",
            "Inner norms have no gains. Features are drawn once. Pixels are never jittered, tokens never skipped.",
            "Weights are stored in 16 bits. Only the causal form is built. Attention while decoding is dense.",
        ),
        lacks={
            "mask": "a mean of all values is mixed in: it is dense attention under no mask",
            "chunks": "the picture of a piece has nothing above it, and a row's budget follows from the whole length",
        },
    )

    pixels: int = 64
    train_steps: int = 100
    train_texts: int = 1
    train_share: float = 0.25
    learning_rate: float = 3e-3

    def __post_init__(self):
        super().__post_init__()
        if self.pixels < 4 or self.pixels % 4:
            asked = f"sea.pixels={self.pixels}"
            raise BadOption(asked, "it takes a multiple of 4, from 4", "The authors have 128 and 256.")
        bounds.at_least_one(self, "train_steps", "train_texts")
        bounds.share(self, "train_share", "the pairs")
        bounds.above_zero(self, "learning_rate")

    def check(self, site: Site) -> list[str]:
        if self.artefact is None:
            return ["no estimator was trained for this model: saccade calibrate sea"]
        tensors = self.artefact.tensors
        found = len(tensors["last"]), tensors["last"].shape[1], tensors["encode"].shape[2] // 2
        here, reasons = (site.layers, site.all_heads, site.head_size), super().check(site)
        drawn = tensors["gain"].shape[1]
        if drawn != self.pixels:
            reasons.append(f"pixels={self.pixels}, and its estimator was trained to draw {drawn}")
        if found != here:
            reasons.append(f"its estimator is for (layers, heads, head size) = {found}, here: {here}")
        return reasons

    # --- one prompt -------------------------------------------------------------------------------------------------

    def attend(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], v: Float[Tensor, "b g k d"], site: Site
    ) -> Float[Tensor, "b h q d"]:
        if site.budget.row_tokens(site.keys) >= site.keys:
            return site.attend(q, k, v, dense(site.queries, site.keys))
        image, gates = estimate(q, k, v, self._weights(site.layer, q.device), site)
        drawn = dataclasses.replace(site, handed={"image": image})  # `select` is given no values
        return mixed(site.attend(q, k, v, self.select(q, k, drawn)), v, gates)

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        row = site.budget.row_tokens(site.keys)
        if row >= site.keys:
            return dense(site.queries, site.keys)
        image = site.handed["image"].detach()
        edge = edges(site.queries, site.keys, image.shape[-1], image.device)
        ranges = _runs(site.shard.mine(best_pixels(image, edge, row), 1), edge)
        own = torch.arange(site.offset, site.keys, device=q.device, dtype=torch.int32)[:, None]
        own = own.expand(*ranges.shape[:2], -1, -1)
        return Gather(index=own, ranges=ranges, queries=site.queries, keys=site.keys)

    def _weights(self, layer: int, device: torch.device) -> Weights:
        assert self.artefact is not None, "check refuses to run without"
        if device not in self._placed:
            self._placed[device] = {n: x.to(device, torch.float32) for n, x in self.artefact.tensors.items()}
        return {name: x[layer] for name, x in self._placed[device].items()}

    @functools.cached_property
    def _placed(self) -> dict[torch.device, dict[str, Tensor]]:
        """Weights where they are used."""
        return {}

    # --- offline ----------------------------------------------------------------------------------------------------

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        """Estimators of all layers, from one dense forward over each sample. Interrupted, it goes on where it was."""
        weights, figures = model.distil_estimators(self, samples, progress)
        return model.artefact(self, {n: x.half() for n, x in weights.items()}, samples, figures)


# --- the estimator, of one layer ------------------------------------------------------------------------------------


def estimate(
    q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], v: Float[Tensor, "b g k d"], weights: Weights, site: Site
) -> tuple[Float[Tensor, "b all q p"], Float[Tensor, "b h q 2"]]:
    """Logits of all heads' picture, one row for each query, and s_1, s_2. A row depends on nothing behind its query."""
    kind = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(kind) for x in (q, k, v))
    weights = {name: x.to(kind) for name, x in weights.items()}
    group = q.shape[1] // k.shape[1]
    directions = _directions(site.head_size, site.layer).to(q)
    q, k = ((x * site.scale**0.5 @ directions.mT).relu() + LEAST_FEATURE for x in (q, k))
    values = torch.cat([positions(site.seen - site.keys, v).expand_as(v), v], -1)
    total, weight = ops.linear_attend(q, k, values)
    own = v[:, :, site.offset :].repeat_interleave(group, 1)
    e = torch.cat([total / weight[..., None], own], -1) @ weights["encode"] + weights["encode_bias"]
    e = gelu(layer_norm(e, e.shape[-1:]))
    gates = torch.sigmoid(e @ weights["mix"][:-1] + weights["mix"][-1])
    drawn = site.shard.gather(e @ weights["decode"] + weights["decode_bias"], 1)  # pictures of all heads mix
    return _picture(drawn, weights), gates


def _picture(x: Float[Tensor, "b h q c"], weights: Weights) -> Float[Tensor, "b h q p"]:
    """Two channels a head, three convolutions that look at no later row, the last at four times the width."""
    x = rearrange(x, "b h q (two w) -> b (h two) q w", two=2)
    x = layer_norm(x, x.shape[-1:])
    for name in ("first", "second"):
        x = pad(x, (DILATION, DILATION, 2 * DILATION, 0))
        x = conv2d(x, weights[name], weights[f"{name}_bias"], dilation=DILATION).relu()
    x = pad(x.repeat_interleave(4, -1), (1, 1, 2, 0))
    x = conv2d(x, weights["last"], weights["last_bias"])
    return layer_norm(x, x.shape[-1:], weights["gain"], weights["shift"])


def _directions(size: int, layer: int) -> Float[Tensor, "m d"]:
    """Of the features: d ln d / 8 of them, as the authors have for texts."""
    many = max(1, int(size * math.log(size) / 8))
    return ops.orthogonal_directions(many, size, rng.generator("sea/features", 0, layer))


def positions(first: int, like: Float[Tensor, "b g k d"]) -> Float[Tensor, "k d"]:
    """I(t): cosines and sines of t theta^(-2i/d)."""
    n, d = like.shape[-2:]
    speed = THETA ** -(torch.arange(-(-d // 2), device=like.device, dtype=torch.float64) * 2 / d)
    angle = (first + torch.arange(n, device=like.device))[:, None] * speed
    return torch.cat([angle.cos(), angle.sin()], -1)[:, :d].to(like.dtype)


def mixed(
    out: Float[Tensor, "b h q d"], v: Float[Tensor, "b g k d"], gates: Float[Tensor, "b h q 2"]
) -> Float[Tensor, "b h q d"]:
    """s_2 s_1 out + (1 - s_2) mean of the values up to the query's."""
    counts = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    mean = (v.to(gates.dtype).cumsum(2) / counts)[:, :, v.shape[2] - out.shape[2] :]
    mean = mean.repeat_interleave(out.shape[1] // v.shape[1], 1)
    first, second = gates[..., :1], gates[..., 1:]
    return (second * first * out.to(gates.dtype) + (1 - second) * mean).to(out.dtype)


# --- from pixels to tokens ------------------------------------------------------------------------------------------


def edges(queries: int, keys: int, pixels: int, device: torch.device) -> Int[Tensor, "q p+1"]:
    """Pixel p of a row holds the tokens [edge p, edge p + 1) of those before its query."""
    length = torch.arange(keys - queries + 1, keys + 1, device=device, dtype=torch.float64)[:, None]
    pixel = torch.arange(pixels + 1, device=device, dtype=torch.float64)
    edge = torch.ceil((pixel + 1e-4) * length / pixels - 0.5).clamp(min=0)
    edge[:, 0], edge[:, -1] = 0, length[:, 0]
    return torch.minimum(edge, length - 1).int()


def best_pixels(
    image: Float[Tensor, "b h q p"], edge: Int[Tensor, "q p+1"], row_tokens: int
) -> Bool[Tensor, "b h q p"]:
    """Best first over all heads of a row, while their tokens and every head's own fit into its budget."""
    share = rearrange(image.softmax(-1), "b h q p -> b q (h p)")  # heads compete by shares, not by logits
    width, heads = edge.diff(dim=-1), image.shape[1]
    order = share.argsort(dim=-1, descending=True, stable=True)
    spent = width.repeat(1, heads).expand_as(order).gather(-1, order).cumsum(-1)
    before = edge[:, -1:]  # tokens of a row but its own
    fits = spent <= heads * before.clamp(max=row_tokens - 1)
    keep = torch.zeros_like(fits).scatter(-1, order, fits)
    return rearrange(keep, "b q (h p) -> b h q p", h=heads) & (width > 0)


def _runs(keep: Bool[Tensor, "b h q p"], edge: Int[Tensor, "q p+1"]) -> Int[Tensor, "b h q r 2"]:
    """Kept pixels side by side as one range of tokens; [0, 0) where a row has fewer."""
    pixels = keep.shape[-1]
    first, last = keep & ~pad(keep, (1, -1)), keep & ~pad(keep, (-1, 1))
    most = max(1, int(first.sum(-1).max()))
    at = torch.arange(pixels, device=keep.device)
    ends = [torch.where(some, at, pixels).sort(-1).values[..., :most] for some in (first, last)]
    there, edge = ends[0] < pixels, edge.expand(*keep.shape[:2], -1, -1)
    ranges = [edge.gather(-1, (x + i).clamp(max=pixels)) * there for i, x in enumerate(ends)]
    return torch.stack(ranges, -1).int()
