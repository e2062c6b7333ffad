"""Numbers in groups of 2 or 4 bits each, between the least and the largest of their group."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from saccade.core.errors import BadOption

BITS = (2, 4)


@torch.no_grad()
def quantise_groups(x: Float[Tensor, "*groups m"], bits: int) -> tuple[UInt8[Tensor, "*groups p"], Tensor]:
    """x ~ low + step code,  low = min x,  step = (max x - min x) / (2^bits - 1)  of each group, code = 0 .. 2^bits - 1.

    Gives codes, 8 / bits to a byte with the first in the lowest bits, and [*groups 2]: low and step, in the dtype of x.
    Codes are of low and step as they are stored, so rounding these costs nothing more; step is 1 where all are alike.

    Raises:
        BadOption: other than 2 or 4 bits.
    """
    if bits not in BITS:
        raise BadOption(f"quantise groups to {bits} bits", "there are 2 and 4", "Give one of those.")
    codes, span = levels(x, bits, -1)
    return squeeze(codes, bits), span.squeeze(-2)


def levels(x: Float[Tensor, "*a"], bits: int, dim: int) -> tuple[UInt8[Tensor, "*a"], Float[Tensor, "*b 2"]]:
    """Codes of groups along `dim`, a byte each; low and step, with that dimension of size 1."""
    wide = torch.promote_types(x.dtype, torch.float32)
    low, high = x.aminmax(dim=dim, keepdim=True)
    step = ((high.to(wide) - low.to(wide)) / (2**bits - 1)).to(x.dtype)
    step = step.masked_fill(step == 0, 1.0)
    codes = ((x.to(wide) - low.to(wide)) / step.to(wide)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, torch.stack([low, step], -1)


def squeeze(codes: UInt8[Tensor, "*a m"], bits: int) -> UInt8[Tensor, "*a p"]:
    """As many to a byte as go in, the first in the lowest bits."""
    slots = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (8 // bits))).unflatten(-1, (-1, 8 // bits))
    return (slots << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def stretch(codes: UInt8[Tensor, "*a p"], bits: int, size: int) -> UInt8[Tensor, "*a m"]:
    """A byte each again."""
    return ((codes[..., None] >> _shifts(bits, codes.device)) & (2**bits - 1)).flatten(-2)[..., :size]


def dequantise_groups(
    codes: UInt8[Tensor, "*groups p"], span: Float[Tensor, "*groups 2"], bits: int, size: int
) -> Float[Tensor, "*groups m"]:
    """What groups of `size` numbers stand for, in the dtype of `span`."""
    wide = torch.promote_types(span.dtype, torch.float32)
    low, step = span.to(wide).split(1, -1)
    return (low + step * stretch(codes, bits, size)).to(span.dtype)


def _shifts(bits: int, device: torch.device) -> UInt8[Tensor, " s"]:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
