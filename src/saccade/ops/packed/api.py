"""Keys and values of many tokens in 2 or 4 bits for each number, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from saccade.core.errors import BadInput, BadOption
from saccade.core.selection import dense
from saccade.ops import device, dispatch
from saccade.ops.attend.api import attend
from saccade.ops.merge_lse.api import merge_lse
from saccade.ops.quantise.groups import BITS, levels, squeeze, stretch

PIECE = 1024  # tokens that are spelt out at a time


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Units of tokens, one behind the other; every row has as many tokens, and as many units.

    k ~ low + step code,  low and step of each channel of a unit;  v ~ scale (low + step code),  low and step of each
    token, scale of each channel of a unit.

    keys, values: codes, 8 / bits channels to a byte, the first in the lowest bits
    key_span, value_span: low and step, in the dtype of what was packed
    tokens: of each unit
    """

    keys: UInt8[Tensor, "r t p"]
    values: UInt8[Tensor, "r t p"]
    key_span: Float[Tensor, "r u d 2"]
    value_span: Float[Tensor, "r t 2"]
    value_scale: Float[Tensor, "r u d"]
    tokens: Int[Tensor, "r u"]

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.value_scale.shape[-1]

    @property
    def bits(self) -> int:
        """2 or 4."""
        return 8 * self.keys.shape[-1] // self.size


@torch.no_grad()
def pack_tokens(k: Float[Tensor, "r t d"], v: Float[Tensor, "r t d"], bits: int) -> Packed:
    """One unit; none where there is no token.

    Channels of the values are made alike before their tokens are: scale = sqrt(max_t |v|), 1 where all are 0.

    Raises:
        BadOption: other than 2 or 4 bits.
        BadInput: heads whose channels do not fill whole bytes.
    """
    if bits not in BITS:
        raise BadOption(f"pack tokens in {bits} bits", "there are 2 and 4", "Give one of those.")
    (r, t, d), each = k.shape, 8 // bits
    if d % each:
        raise BadInput(f"pack heads of {d} in {bits} bits", f"{each} channels share a byte", f"Pad to {d + -d % each}.")
    if not t:
        empty, codes = k.new_empty(r, 0, d), torch.empty(r, 0, d // each, dtype=torch.uint8, device=k.device)
        span, tokens = k.new_empty(r, 0, d, 2), torch.empty(r, 0, dtype=torch.int32, device=k.device)
        made = {"key_span": span, "value_span": span[:, :, 0], "value_scale": empty, "tokens": tokens}
        return Packed(keys=codes, values=codes, **made)
    keys, key_span = levels(k, bits, 1)
    scale = v.abs().amax(1, keepdim=True).sqrt()
    scale = scale.masked_fill(scale == 0, 1.0)
    values, value_span = levels(v / scale, bits, -1)
    return Packed(
        keys=squeeze(keys, bits), values=squeeze(values, bits), key_span=key_span, value_span=value_span.squeeze(2),
        value_scale=scale, tokens=torch.full((r, 1), t, dtype=torch.int32, device=k.device),
    )  # fmt: skip


def unpack_tokens(
    x: Packed, first: int = 0, last: int | None = None
) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
    """Keys and values that tokens [first, last) stand for."""
    wide = torch.promote_types(x.value_scale.dtype, torch.float32)
    codes, some = stretch(x.keys[:, first:last], x.bits, x.size), slice(first, last)
    unit = _unit(x, first, first + codes.shape[1])
    low, step = (_of_unit(part, unit).to(wide) for part in x.key_span.unbind(-1))
    keys = low + step * codes
    low, step = x.value_span[:, some].to(wide).split(1, -1)
    values = (low + step * stretch(x.values[:, some], x.bits, x.size)) * _of_unit(x.value_scale, unit).to(wide)
    return keys.to(x.key_span.dtype), values.to(x.value_scale.dtype)


def _unit(x: Packed, first: int, last: int) -> Int[Tensor, "r n"] | None:
    """Which unit each of the tokens belongs to; None: there is one."""
    if x.tokens.shape[1] == 1:
        return None
    at = torch.arange(first, last, device=x.tokens.device).expand(len(x.tokens), -1)
    return torch.searchsorted(x.tokens.cumsum(1), at.contiguous(), right=True)


def _of_unit(x: Float[Tensor, "r u d"], unit: Int[Tensor, "r n"] | None) -> Float[Tensor, "r n|1 d"]:
    return x if unit is None else x.gather(1, unit[..., None].expand(-1, -1, x.shape[-1]))


def attend_packed(
    q: Float[Tensor, "r s q d"], x: Packed, *, scale: float | None = None, softcap: float | None = None,
    impl: str = "auto", report: dispatch.Report | None = None,
) -> tuple[Float[Tensor, "r s q d"], Float[Tensor, "r s q"]]:  # fmt: skip
    """Every query of row r reads all tokens of row r. Output and log-sum-exp, as in `attend`.

    impl: "auto", "torch" (spelt out piece by piece), "triton" (CUDA, from the codes, for few queries; first there)
    report: is told which back end ran, as "attend_packed:torch"

    Raises:
        BadInput: other rows or another head size, or no tokens.
        CannotRun: the back end that was asked for cannot compute this, with every reason.
    """
    r, t, _ = x.keys.shape
    if q.dim() != 4 or (q.shape[0], q.shape[3]) != (r, x.size) or not t:
        asked = f"attention of {tuple(q.shape)} over {t} packed tokens of {r} heads of {x.size}"
        raise BadInput(asked, "it takes [rows, heads, queries, size] and a token to read", "Lay them out like that.")
    scale = x.size**-0.5 if scale is None else scale
    able = dispatch.with_triton(q, lambda: _reasons(q, x), {"torch": list})
    if dispatch.pick("attend_packed", impl, able, report) == "triton":
        from saccade.ops.packed import triton as kernels

        return kernels.attend(q, x, scale=scale, softcap=softcap)
    parts = []
    for first in range(0, t, PIECE):
        k, v = (y[:, None] for y in unpack_tokens(x, first, min(first + PIECE, t)))
        whole = dense(q.shape[2], k.shape[2], causal=False)
        parts.append(attend(q, k, v, whole, scale=scale, softcap=softcap))
    return parts[0] if len(parts) == 1 else merge_lse(*zip(*parts))


def _reasons(q: Tensor, x: Packed) -> dispatch.Reasons:
    if not device.installed():
        return device.triton_reasons(q)
    from saccade.ops.packed import triton as kernels

    return kernels.reasons(q, x)
