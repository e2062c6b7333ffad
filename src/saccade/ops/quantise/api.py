"""Keys or values in 8 or 4 bits, with one scale for each token of each head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from saccade.core.errors import BadInput, BadOption

LARGEST = {8: 127, 4: 7}  # codes are symmetric: -127 .. 127, -7 .. 7


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """x ~ scale code, one scale a token and head.

    codes: 8 bits: int8. 4 bits: uint8, code plus 8: channel d in the lower half of a byte, d + size / 2 in the upper
    scale: in the dtype of what was quantised
    size: channels of a head
    """

    codes: Int[Tensor, "b g k d"] | UInt8[Tensor, "b g k d/2"]
    scale: Float[Tensor, "b g k"]
    size: int

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> torch.Size:
        """Of what it stands for."""
        return torch.Size((*self.codes.shape[:-1], self.size))

    @property
    def bytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes


@torch.no_grad()
def quantise(x: Float[Tensor, "b g k d"], bits: int) -> Quantised:
    """code = round(x / scale), scale = max_d |x| / 127 (8 bits) or / 7 (4 bits) of each token, in the dtype of x.

    Codes are of the scale as it is stored, so its rounding costs nothing; a token of zeros has scale 1.

    Raises:
        BadOption: other than 8 or 4 bits.
        BadInput: heads that cannot be packed: of a size that is no multiple of 2 (8 bits) or 4 (4 bits).
    """
    if bits not in LARGEST:
        raise BadOption(f"quantise to {bits} bits", "there are 8 and 4", "Give one of those.")
    if x.shape[-1] % (16 // bits):
        found = f"{16 // bits} of them share 16 bits"
        raise BadInput(f"quantise heads of {x.shape[-1]} to {bits} bits", found, f"Pad to a multiple of {16 // bits}.")
    wide = torch.promote_types(x.dtype, torch.float32)
    most = x.abs().amax(-1).to(wide)
    scale = (most / LARGEST[bits]).to(x.dtype)
    scale = scale.masked_fill(scale == 0, 1.0)
    codes = (x.to(wide) / scale[..., None].to(wide)).round().clamp(-LARGEST[bits], LARGEST[bits]).to(torch.int8)
    return Quantised(codes=codes if bits == 8 else _packed(codes), scale=scale, size=x.shape[-1])


def dequantise(x: Quantised, dtype: torch.dtype | None = None) -> Float[Tensor, "b g k d"]:
    """What it stands for, in the dtype of its scales or in `dtype`."""
    codes = x.codes
    if x.bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1).to(torch.int8) - 8
    dtype = dtype or x.scale.dtype
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * x.scale[..., None].to(wide)).to(dtype)


def _packed(codes: Int[Tensor, "*a d"]) -> UInt8[Tensor, "*a d/2"]:
    lower, upper = (codes + 8).to(torch.uint8).chunk(2, -1)
    return lower | (upper << 4)
