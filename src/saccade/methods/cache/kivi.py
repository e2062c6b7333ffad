"""KIVI: old keys in 2 bits channel by channel, old values token by token, the newest tokens as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.site import Site


@dataclass(frozen=True)
class Kivi(Cache):
    """Store each number of an old key or value in 2 or 4 bits.

    A group X of numbers is stored as  Q = round((X - z) / s),  z = min X,  s = (max X - min X) / (2^B - 1),  and read
    as  s Q + z.  Some channels of keys are large in every token, so a group of keys is one channel of some tokens, and
    an error stays in its channel; values have no such channels, and a group is some channels of one token, so that an
    error stays in its token. The newest tokens are stored as they are.

    bits: B, of each number, beside z and s of its group in the model's precision
    group_tokens: tokens that are packed together, and of a group along the tokens
    group_channels: of a group along the channels; the head, where that is smaller
    residual_tokens: newest tokens that are never packed; and those behind them that fill no group yet
    keys, values: what a group of either is: one "channel" of some tokens, or some channels of one "token"

    Packing begins when the prompt has been read: the prompt's own attention is exact. It drops nothing, so it takes no
    budget of its own; beside an eviction, what that leaves is packed.

    Raises:
        BadOption: groups of nothing.
    Source: arXiv 2402.02750, sections 3.2 and 3.3, algorithm 1; jy-yuan/KIVI, llama_kivi.py and new_pack.py.
    """

    card = Card(
        name="kivi",
        title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        family="cache",
        paper="arXiv:2402.02750",
        year=2024,
        authors="Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu",
        official="jy-yuan/KIVI",
        licence_of_official="MIT",
        summary="Old keys are stored in 2 bits by channel, old values by token, the newest tokens as they are.",
        equation="X ~ s Q + z,  Q = round((X - z) / s),  z = min X,  s = (max X - min X) / (2^B - 1)",
        budget="nothing by itself: bytes follow from bits and residual_tokens. Beside an eviction it is the eviction's",
        takes_budget=False,
        departures=(
            "Keys and values are packed together, a group of tokens at a time, as soon as it lies behind the"
            " residual_tokens newest: so many are always exact. The authors pack keys residual_tokens at a time, so"
            " that none to all of these are exact, and values one by one.",
            "A token finds packed what had been packed before it came, also where many are read in one forward.",
            "On every device packed tokens are spelt out in plain PyTorch, 1,024 at a time: memory is saved, time is"
            " not. The authors have a kernel that multiplies with codes.",
            "Query heads that share a key/value head are served; the authors' first code for Llama has none.",
            "transformers' QuantizedCache packs the whole prompt, and all of it again when its residual is full.",
        ),
        lacks={
            "full-budget": "it takes no budget, and rounds whatever is packed",
            "mask": "packed keys and values are rounded, which no mask says",
            "chunks": "tokens after the prompt read rounded keys and values, those of one pass over everything exact"
            " ones; a prompt given in chunks is packed at its end and agrees",
        },
    )

    bits: Literal[2, 4] = 2
    group_tokens: int = 32
    group_channels: int = 32
    residual_tokens: int = 128
    keys: Literal["channel", "token"] = "channel"
    values: Literal["token", "channel"] = "token"

    def __post_init__(self):
        super().__post_init__()
        for name in ("group_tokens", "group_channels"):
            if getattr(self, name) < 1:
                raise BadOption(f"kivi.{name}=0", "a group has one number or more", "Give at least 1; it is 32 else.")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("pack",)

    def check(self, site: Site) -> list[str]:
        reasons = []
        if site.head_size % min(self.group_channels, site.head_size):
            reasons.append(f"group_channels={self.group_channels} does not divide a head of {site.head_size}")
        if site.head_size % (8 // self.bits):
            reasons.append(f"bits={self.bits}: {8 // self.bits} channels share a byte, and a head has {site.head_size}")
        return reasons

    def packed_tokens(self, tokens: int) -> int:
        return max(0, tokens - self.residual_tokens) // self.group_tokens * self.group_tokens

    def pack(self, k: Float[Tensor, "r n d"], v: Float[Tensor, "r n d"]) -> dict[str, Tensor]:
        out = {}
        for name, x in (("keys", k), ("values", v)):
            out[name], out[name + "_span"] = ops.quantise_groups(self._groups(x, getattr(self, name)), self.bits)
        return out

    def unpack(self, packed: Mapping[str, Tensor]) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        k, v = (self._spelt_out(packed[n], packed[n + "_span"], getattr(self, n)) for n in ("keys", "values"))
        return k, v

    def _groups(self, x: Float[Tensor, "r n d"], along: str) -> Tensor:
        """Groups as the last axis: [r u d t], or [r u t c m] for c groups of m channels; u units of t tokens."""
        if along == "channel":
            return rearrange(x, "r (u t) d -> r u d t", t=self.group_tokens)
        size = min(self.group_channels, x.shape[-1])
        return rearrange(x, "r (u t) (c m) -> r u t c m", t=self.group_tokens, m=size)

    def _spelt_out(self, codes: Tensor, span: Tensor, along: str) -> Float[Tensor, "r n d"]:
        """Codes of such groups as tokens again."""
        if along == "channel":
            x = ops.dequantise_groups(codes, span, self.bits, self.group_tokens)
            return rearrange(x, "r u d t -> r (u t) d")
        x = ops.dequantise_groups(codes, span, self.bits, self.group_channels)
        return rearrange(x, "r u t c m -> r (u t) (c m)")
