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
    wide = torch.promote_types(x.dtype, torch.float32)
    low, high = x.aminmax(dim=-1, keepdim=True)
    step = ((high.to(wide) - low.to(wide)) / (2**bits - 1)).to(x.dtype)
    step = step.masked_fill(step == 0, 1.0)
    codes = ((x.to(wide) - low.to(wide)) / step.to(wide)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    slots = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (8 // bits))).unflatten(-1, (-1, 8 // bits))
    return (slots << _shifts(bits, x.device)).sum(-1, dtype=torch.uint8), torch.cat([low, step], -1)


def dequantise_groups(
    codes: UInt8[Tensor, "*groups p"], span: Float[Tensor, "*groups 2"], bits: int, size: int
) -> Float[Tensor, "*groups m"]:
    """What groups of `size` numbers stand for, in the dtype of `span`."""
    wide = torch.promote_types(span.dtype, torch.float32)
    each = ((codes[..., None] >> _shifts(bits, codes.device)) & (2**bits - 1)).flatten(-2)[..., :size]
    low, step = span.to(wide).split(1, -1)
    return (low + step * each).to(span.dtype)


def _shifts(bits: int, device: torch.device) -> UInt8[Tensor, " s"]:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
