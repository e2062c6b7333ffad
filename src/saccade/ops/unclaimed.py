"""Numbers in a row inside Triton kernels, about which the compiler knows less than it could."""

import triton
import triton.language as tl


@triton.jit
def unclaimed(N: tl.constexpr):
    """[0, N), of which the compiler does not know that it begins at a multiple of every power of two.

    For the remainder in a sum with a number that was loaded, as in page * PAGE + i % PAGE. Triton (seen in 3.6) takes
    the sum for a multiple of what both begin at multiples of, though its entries do not follow on one another any more.
    It then answers `key <= position` once for eight rows, and would load in wider pieces than the addresses allow.
    """
    return tl.arange(1, N + 1) - 1
