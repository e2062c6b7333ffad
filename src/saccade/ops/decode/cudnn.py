"""One query over all keys by cuDNN. The query heads of a key/value head ask as if they were its queries, so no key is
repeated. cuDNN makes a plan for every new number of keys, and a text that grows has a new number at every step: so only
where it is asked for by name, for caches of a fixed size."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.ops.device import HALVES


def reasons(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, visible: Tensor | None, softcap: float | None
) -> list[str]:
    """Why cuDNN cannot decode this; [] = it can."""
    why = []
    if not q.is_cuda or torch.version.hip:
        why.append(f"cuDNN runs on NVIDIA's devices, and the inputs are on the {q.device.type}")
    elif not torch.backends.cudnn.is_available():
        why.append("this torch has no cuDNN")
    if q.dtype not in HALVES:
        why.append(f"it takes 16-bit floats, and the inputs are {str(q.dtype).removeprefix('torch.')}")
    if index is not None or visible is not None or softcap is not None:
        why.append("it reads all keys, with no index, mask or softcap")
    if q.shape[2] != 1:
        why.append(f"{q.shape[2]} queries, which would be causal among themselves; it takes one")
    if max(q.shape[-1], v.shape[-1]) > 128 or q.shape[-1] % 8 or v.shape[-1] % 8:
        why.append(f"heads of {q.shape[-1]} and {v.shape[-1]}; it takes multiples of 8 up to 128")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        why.append("it gives no gradient here, and an input asks for one: call it under torch.no_grad()")
    return why


def decode(
    q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b g k d"], v: Float[Tensor, "b g k dv"], *, scale: float
) -> tuple[Float[Tensor, "b h 1 dv"], Float[Tensor, "b h 1"]]:
    """See the op's api."""
    (b, h, _, _), g = q.shape, k.shape[1]
    rows = q.reshape(b, g, h // g, -1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(rows, k, v, None, True, 0.0, False, scale=scale)
    return out.reshape(b, h, 1, -1), lse.reshape(b, h, 1)
