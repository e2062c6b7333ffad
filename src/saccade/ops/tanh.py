"""The hyperbolic tangent in Triton, which has none of its own that its interpreter knows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """EXACT: to an ulp or two. Else to 1e-7, which near 0 is many ulps of the result."""
    size = tl.abs(x)
    e = tl.math.exp2(size * (-2.0 * 1.4426950408889634))
    far = (1.0 - e) / (1.0 + e)
    if EXACT:  # below 0.625, where 1 - e cancels: x + x^3 P(x^2), with P the fit of Cephes (S. Moshier, tanhf)
        z = x * x
        fit = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        near = size + size * z * (fit - 3.33332819422e-1)
        far = tl.where(size < 0.625, near, far)
    return tl.where(x < 0, -far, far)
