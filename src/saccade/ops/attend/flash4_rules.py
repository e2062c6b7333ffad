"""Which pairs of a block count, for the kernels of flash-attn-4: compiled into them. Imports that library.

Arguments: sequence, query head, query and key (vectors of one number), the lengths, and the tensors of the call.
"""

import cutlass
import cutlass.cute as cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def bounds(batch, head, query, key, lengths, tensors):
    """Every key that there is."""
    return key < scalar_to_ssa(lengths.seqlen_k, cutlass.Int32)


@cute.jit
def blocks(batch, head, query, key, lengths, tensors):
    """No key behind the query; the last query is at the last key."""
    return key <= query + scalar_to_ssa(lengths.seqlen_k - lengths.seqlen_q, cutlass.Int32)


@cute.jit
def spans(batch, head, query, key, lengths, tensors):
    """Of those, the first `tensors[0]` of the head, and those less than `tensors[1]` behind the query."""
    place = query + scalar_to_ssa(lengths.seqlen_k - lengths.seqlen_q, cutlass.Int32)
    sinks = scalar_to_ssa(tensors[0][head[0]], cutlass.Int32)
    window = scalar_to_ssa(tensors[1][head[0]], cutlass.Int32)
    return (key <= place) & ((place < key + window) | (key < sinks))
